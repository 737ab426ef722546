"""The denoiser's forward and backward pass as CUDA graphs: recorded once for each shape, then replayed.

A step of a UNet is some ten thousand kernels, and Python needs longer to launch them than a fast GPU to run them (docs/performance.md).
torch.compile on top of it saved one or two hundredths of a step on an H200 and cost half a minute, so it is not used.
"""

from typing import Any

import torch
from torch import Tensor, nn

from trainer.families.base import Batch, ModelFamily
from trainer.families.objective import Noised

MOST_SHAPES = 16  # each keeps its inputs and outputs; the activations share one pool


class _Predict(nn.Module):
    """`family.predict` with tensors alone as arguments, which is what a graph can be recorded of."""

    def __init__(self, family: ModelFamily, denoiser: nn.Module, names: list[str]):
        super().__init__()
        self.family, self.denoiser, self.names = family, denoiser, names

    def forward(
        self, noisy_latents: Tensor, timesteps: Tensor, size_ids: Tensor, *conditioning: Tensor
    ) -> Tensor:
        noised = Noised(noisy_latents, timesteps, noisy_latents)
        return self.family.predict(
            self.denoiser,
            noised,
            Batch(noisy_latents, dict(zip(self.names, conditioning, strict=True)), size_ids),
        )


class GraphedPredict:
    """`family.predict` for training. A shape is recorded when it comes the second time; what cannot be recorded runs as it is.

    The parameters' gradients must not be None when a graph runs: autograd would take the graph's own memory for them, which the next
    microbatch overwrites.
    """

    def __init__(self, family: ModelFamily, denoiser: nn.Module):
        self.family, self.denoiser = family, denoiser
        self.graphs: dict[tuple[Any, ...], Any] = {}
        self.seen: set[tuple[Any, ...]] = set()
        self.refusal = ""
        """Why nothing is recorded any more; empty while all is well."""
        self.awaits_backward = False

    def __call__(self, noised: Noised, batch: Batch) -> Tensor:
        names = sorted(batch.conditioning)
        arguments = (
            noised.noisy_latents,
            noised.timesteps,
            batch.size_ids,
            *(batch.conditioning[name] for name in names),
        )
        key = tuple(
            (tuple(argument.shape), argument.dtype, argument.requires_grad)
            for argument in arguments
        )
        if (
            not torch.is_grad_enabled() or self.awaits_backward
        ):  # a graph's activations last until it runs again
            return self.family.predict(self.denoiser, noised, batch)
        if (
            key in self.seen
            and key not in self.graphs
            and not self.refusal
            and len(self.graphs) < MOST_SHAPES
        ):
            self._record(key, names, arguments)
        self.seen.add(key)
        if key not in self.graphs:
            return self.family.predict(self.denoiser, noised, batch)
        model_pred = self.graphs[key](*arguments)
        self.awaits_backward = True
        model_pred.register_hook(self._backward_done)
        return model_pred

    def _backward_done(self, gradient: Tensor) -> None:
        self.awaits_backward = False

    def _record(
        self, key: tuple[Any, ...], names: list[str], arguments: tuple[Tensor, ...]
    ) -> None:
        examples = tuple(
            argument.detach().clone().requires_grad_(argument.requires_grad)
            for argument in arguments
        )
        module = _Predict(self.family, self.denoiser, names).train()
        pool = (
            next(iter(self.graphs.values())).pool if self.graphs else torch.cuda.graph_pool_handle()
        )
        try:
            graphed = torch.cuda.make_graphed_callables(
                module, examples, allow_unused_input=True, pool=pool
            )
        except RuntimeError as error:  # also where memory is too short for the recording: the step itself may well fit
            self.refusal = str(error).splitlines()[0][:200]
            torch.cuda.empty_cache()
            return
        graphed.pool = pool
        self.graphs[key] = graphed
        for parameter in self.denoiser.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def release(self) -> None:
        """Forgets what was recorded, and its memory: the model is about to change."""
        self.graphs.clear()
        self.seen.clear()
        self.awaits_backward = False

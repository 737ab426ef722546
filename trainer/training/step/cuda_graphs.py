"""The denoiser's forward and backward pass as CUDA graphs, recorded once per shape.

A step of a UNet launches some ten thousand kernels, and Python needs longer to launch them than a
fast GPU to run them (docs/performance.md). torch.compile in addition saved one or two percent of a
step on an H200 and cost half a minute, so it is not used.
"""

from typing import Any

import torch
from torch import Tensor, nn

from trainer.families.base import Batch, ModelFamily
from trainer.families.objective import Noised

MAX_SHAPES = 16
"""Each recorded shape keeps its inputs and outputs; all share one pool for activations."""

ShapeKey = tuple[tuple[tuple[int, ...], torch.dtype, bool], ...]


class _Predict(nn.Module):
    """`family.predict` with only tensors as arguments, so that a graph can record it."""

    def __init__(self, family: ModelFamily, denoiser: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.family = family
        self.denoiser = denoiser
        self.names = names

    def forward(
        self, noisy_latents: Tensor, timesteps: Tensor, size_ids: Tensor, *conditioning: Tensor
    ) -> Tensor:
        noised = Noised(noisy_latents, timesteps, noisy_latents)
        named = dict(zip(self.names, conditioning, strict=True))
        return self.family.predict(self.denoiser, noised, Batch(noisy_latents, named, size_ids))


class GraphedPredict:
    """`family.predict` for training. A shape is recorded when it occurs for the second time.

    What cannot be recorded runs without a graph. Gradients of parameters must not be None when a
    graph runs: autograd would use the graph's own memory for them, which the next microbatch
    overwrites.
    """

    def __init__(self, family: ModelFamily, denoiser: nn.Module) -> None:
        self.family = family
        self.denoiser = denoiser
        self.graphs: dict[ShapeKey, Any] = {}
        self.seen: set[ShapeKey] = set()
        self.refusal = ""
        """Why no further shape is recorded; empty if recording works."""
        self.awaits_backward = False
        self._pool: Any = None

    def __call__(self, noised: Noised, batch: Batch) -> Tensor:
        names = sorted(batch.conditioning)
        arguments = (
            noised.noisy_latents,
            noised.timesteps,
            batch.size_ids,
            *(batch.conditioning[name] for name in names),
        )
        key = tuple((tuple(each.shape), each.dtype, each.requires_grad) for each in arguments)
        # A graph's activations last until it runs again, so it must not run before the backward.
        if not torch.is_grad_enabled() or self.awaits_backward:
            return self.family.predict(self.denoiser, noised, batch)
        if self._should_record(key):
            self._record(key, names, arguments)
        self.seen.add(key)
        if key not in self.graphs:
            return self.family.predict(self.denoiser, noised, batch)
        model_pred: Tensor = self.graphs[key](*arguments)
        self.awaits_backward = True
        model_pred.register_hook(self._backward_done)
        return model_pred

    def _should_record(self, key: ShapeKey) -> bool:
        is_known = key in self.seen and key not in self.graphs
        return is_known and not self.refusal and len(self.graphs) < MAX_SHAPES

    def _backward_done(self, gradient: Tensor) -> None:
        self.awaits_backward = False

    def _record(self, key: ShapeKey, names: list[str], arguments: tuple[Tensor, ...]) -> None:
        examples = tuple(
            argument.detach().clone().requires_grad_(argument.requires_grad)
            for argument in arguments
        )
        module = _Predict(self.family, self.denoiser, names).train()
        if not self.graphs:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            graphed = torch.cuda.make_graphed_callables(
                module, examples, allow_unused_input=True, pool=self._pool
            )
        except RuntimeError as error:
            # Also if memory is too short for recording: the step itself may still fit.
            self.refusal = str(error).splitlines()[0][:200]
            torch.cuda.empty_cache()
            return
        self.graphs[key] = graphed
        for parameter in self.denoiser.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def release(self) -> None:
        """Discards the recorded graphs and their memory, because the model will change."""
        self.graphs.clear()
        self.seen.clear()
        self.awaits_backward = False

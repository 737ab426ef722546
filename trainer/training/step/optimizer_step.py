"""Backward pass and weight update of a step."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.errors import NotLearning
from trainer.lora import inject
from trainer.models.device import AsyncScalars
from trainer.models.pipelines import DENOISERS
from trainer.training.session import Session
from trainer.training.step.losses import microbatch_losses

MIN_LOSS_SCALE = 2.0**-10
"""An overflow at a larger fp16 loss scale is part of the scaler's search, not a bad step."""


def forward_backward(session: Session, step: int, scaler: torch.amp.GradScaler) -> Tensor:
    """Accumulates the gradients of this process's share of a step.

    Returns its share of the mean loss over the microbatches, a scalar without gradients.
    """
    microbatches = session.run.training.gradient_accumulation_steps
    splits = session.fallbacks.pieces["step"]
    clear_gradients(session)  # an earlier try may have run out of memory halfway
    _freeze_finished_components(session, step)
    total = torch.zeros((), device=session.device)
    for part, piece, pieces in session.world.shares(microbatches):
        microbatch = (step - 1) * microbatches + part
        for split in range(splits):
            losses = microbatch_losses(session, microbatch, piece * splits + split, pieces * splits)
            while True:
                # The generator runs the forward pass, so `next` is inside the offload context.
                with _activation_offload(session):
                    loss = next(losses, None)
                if loss is None:
                    break
                scaler.scale(loss / microbatches).backward()
                total += loss.detach() / microbatches
    for module in session.model.components.values():
        module.eval()
    return total


def _freeze_finished_components(session: Session, step: int) -> None:
    """Puts trained components in training mode, and drops the gradients of those that stopped.

    With a gradient of zero the optimiser would go on moving a weight by its momentum.
    """
    for name, group in session.optimisation.groups.items():
        if not session.learns(name, step):
            for parameter in group.values():
                parameter.grad = None
    for name, module in session.model.components.items():
        module.train(session.learns(name, step))


def _activation_offload(session: Session) -> AbstractContextManager[object]:
    """Returns a context in which activations are stored on the CPU, if the settings ask for it."""
    if not session.run.training.activation_offload:
        return nullcontext()
    context: AbstractContextManager[object] = torch.autograd.graph.save_on_cpu(
        pin_memory=session.device.type == "cuda"
    )
    return context


def clear_gradients(session: Session) -> None:
    """Sets the gradients to zero on CUDA, where CUDA graphs refer to their memory, else to None."""
    session.optimisation.optimizer.zero_grad(set_to_none=session.device.type != "cuda")


def clip_gradients(session: Session, scaler: torch.amp.GradScaler) -> Tensor:
    """Unscales the gradients and clips them to `training.max_grad_norm`; 0 means no limit.

    Returns whether their norm is finite, a bool scalar on the device.
    """
    scaler.unscale_(session.optimisation.optimizer)
    limit = session.run.training.max_grad_norm or float("inf")
    parameters = session.optimisation.parameters.values()
    return torch.isfinite(torch.nn.utils.clip_grad_norm_(parameters, limit))


@dataclass
class PendingStep:
    """A step whose results may not have reached the host yet."""

    step: int
    begun: float
    """Monotonic clock, in seconds. The end of the step before, if the host was ahead of it."""
    learning_rate: float
    outcome: AsyncScalars
    """The loss, and whether the loss and the gradients were finite."""
    may_overflow: bool
    """Whether an fp16 overflow is part of the gradient scaler's search for its scale."""
    is_ahead: bool
    """Whether the host may launch the next step before it reads the results."""


def runs_ahead(session: Session, scaler: torch.amp.GradScaler) -> bool:
    """Returns whether the host launches a step before it has read the results of the last one.

    Then CUDA never waits for the host. The optimiser must skip a step with infinite gradients on
    the device: torch's fused optimisers can, as they do for a gradient scaler.
    """
    optimisation = session.optimisation
    can_skip_on_device = getattr(optimisation.optimizer, "_step_supports_amp_scaling", False)
    needs_the_host = scaler.is_enabled() or optimisation.average is not None
    is_alone_on_cuda = session.device.type == "cuda" and session.world.size == 1
    return can_skip_on_device and not needs_the_host and is_alone_on_cuda


def optimizer_step(
    session: Session,
    scaler: torch.amp.GradScaler,
    step: int,
    begun: float,
    learning_rate: float,
    loss: Tensor,
    finite: Tensor,
) -> PendingStep:
    """Updates the weights if the loss and the gradients are finite, and clears the gradients.

    If the host runs ahead, there is no `if finite`: a data-dependent branch would synchronise the
    GPU. The optimiser then reads the flag on the device.
    """
    optimisation, run = session.optimisation, session.run
    ahead = runs_ahead(session, scaler)
    if ahead:
        # torch's protocol between a gradient scaler and a fused optimiser.
        optimisation.optimizer.found_inf = (~finite).float()
        optimisation.optimizer.step()
    elif finite:
        scaler.step(optimisation.optimizer)
    if ahead or finite:
        if run.adapter.max_norm:
            inject.cap_norms(session.model.components.values(), run.adapter.max_norm)
        if optimisation.average:
            optimisation.average.step(optimisation.parameters.values())
    may_overflow = scaler.is_enabled() and scaler.get_scale() > MIN_LOSS_SCALE
    scaler.update()
    clear_gradients(session)
    outcome = AsyncScalars(loss, finite)
    return PendingStep(step, begun, learning_rate, outcome, may_overflow, ahead)


def check_gradients_arrive(session: Session, step: int) -> None:
    """Raises NotLearning if no gradient reached a component, as with a broken attention backward.

    In the first step only B has a gradient, because A's is multiplied by B, which is zero. A text
    encoder's gradient may be zero if captions are dropped: some families replace the conditioning
    of an empty caption by zeros. If dropout leaves out whole modules or ranks, every gradient may
    be zero, so nothing is checked.
    """
    if session.run.adapter.module_dropout or session.run.adapter.rank_dropout:
        return
    drops_captions = session.run.dataset.caption_dropout > 0
    for part, module in session.model.components.items():
        may_be_zero = drops_captions and part not in DENOISERS
        gradients = [p.grad for p in inject.trainable(module).values() if p.grad is not None]
        arrived = any(may_be_zero or bool(gradient.any()) for gradient in gradients)
        if session.learns(part, step) and not arrived:
            raise NotLearning(
                f"No gradient reached the adapter in the {part}, so nothing can be learned. "
                f"The attention implementation ({session.model.attention}) has a wrong backward "
                "pass, or the settings freeze everything."
            )

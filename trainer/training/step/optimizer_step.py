"""Gradients of a step, and what moves the weights by them."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from trainer.errors import NotLearning
from trainer.lora import inject
from trainer.models.device import AsyncScalars
from trainer.models.pipelines import DENOISERS
from trainer.training.session import Session
from trainer.training.step.losses import microbatch_losses

SMALLEST_LOSS_SCALE = 2.0**-10  # of fp16; gradients that overflow even so are no accident


def forward_backward(
    session: Session, buckets: list[list[int]], step: int, scaler: torch.amp.GradScaler
) -> torch.Tensor:
    """Sums the gradients of this process's share of the microbatches of a step. Returns its share of their mean loss, without gradients."""
    count, splits = (
        session.run.training.gradient_accumulation_steps,
        session.fallbacks.pieces["step"],
    )
    clear_gradients(session)  # of a try that ran out of memory
    for parameter in (
        p
        for name, group in session.groups.items()
        if not session.learns(name, step)
        for p in group.values()
    ):
        parameter.grad = None  # on zeros the optimiser would go on moving it by its momentum
    for name, module in session.components.items():
        module.train(session.learns(name, step))
    total = torch.zeros((), device=session.device)
    for part, piece, pieces in session.world.shares(count):
        for split in range(splits):
            losses = microbatch_losses(
                session, buckets, (step - 1) * count + part, piece * splits + split, pieces * splits
            )
            while True:
                with keeping_activations(session):
                    loss = next(losses, None)
                if loss is None:
                    break
                scaler.scale(loss / count).backward()
                total += loss.detach() / count
    for module in session.components.values():
        module.eval()
    return total


def keeping_activations(session: Session) -> AbstractContextManager:
    """Where the forward pass leaves what the backward pass needs."""
    if not session.run.training.activation_offload:
        return nullcontext()
    return torch.autograd.graph.save_on_cpu(pin_memory=session.device.type == "cuda")


def clear_gradients(session: Session) -> None:
    session.optimizer.zero_grad(
        set_to_none=session.device.type != "cuda"
    )  # there GraphedPredict needs them to stay


def finite_gradients(session: Session, scaler: torch.amp.GradScaler) -> torch.Tensor:
    """Unscales and clips the gradients; whether they are numbers, a bool scalar on the device."""
    scaler.unscale_(session.optimizer)
    limit = session.run.training.max_grad_norm or float("inf")
    return torch.isfinite(torch.nn.utils.clip_grad_norm_(session.parameters.values(), limit))


@dataclass
class PendingStep:
    """A step whose numbers may not have reached the host yet."""

    step: int
    begun: float
    """By the monotonic clock; the end of the step before, where the host was ahead."""
    learning_rate: float
    outcome: AsyncScalars
    """The loss; whether it and the gradients were finite."""
    may_overflow: bool
    """The scaler of fp16 meets its limit by overflowing now and then."""


def runs_ahead(session: Session, scaler: torch.amp.GradScaler) -> bool:
    """Whether the host launches a step before it knows how the last one ended, so that the device never waits for it.

    That takes an optimiser that leaves out a step by itself: torch's fused ones do, as for a gradient scaler.
    """
    leaves_out = (
        getattr(session.optimizer, "_step_supports_amp_scaling", False)
        and not scaler.is_enabled()
        and not session.average
    )
    return leaves_out and session.device.type == "cuda" and session.world.size == 1


def optimizer_step(
    session: Session,
    scaler: torch.amp.GradScaler,
    step: int,
    begun: float,
    learning_rate: float,
    loss: torch.Tensor,
    finite: torch.Tensor,
) -> PendingStep:
    """Moves the weights where the numbers are finite, and clears the gradients. Where the host runs ahead, nothing waits for the device."""
    ahead = runs_ahead(session, scaler)
    if ahead:
        session.optimizer.found_inf = (~finite).float()
        session.optimizer.step()
    elif finite:
        scaler.step(session.optimizer)
    if ahead or finite:
        if session.run.adapter.max_norm:
            inject.cap_norms(session.components.values(), session.run.adapter.max_norm)
        if session.average:
            session.average.step(session.parameters.values())
    may_overflow = scaler.is_enabled() and scaler.get_scale() > SMALLEST_LOSS_SCALE
    scaler.update()
    clear_gradients(session)
    return PendingStep(step, begun, learning_rate, AsyncScalars(loss, finite), may_overflow)


def check_gradients_arrive(session: Session, step: int) -> None:
    """In the first step only B has a gradient (B is zero, so A has none); a broken attention backward gives none at all.

    That of a text encoder may be zero where captions are dropped: some families put zeros in their place. Where layers or ranks are
    left out by chance, all of them may be, so nothing can be told.
    """
    if session.run.adapter.module_dropout or session.run.adapter.rank_dropout:
        return
    dropping = session.run.dataset.caption_dropout > 0
    for part, module in session.components.items():
        gradients = [p.grad for name, p in inject.trainable(module).items()]
        arrived = any(
            g is not None and (bool(g.any()) or (dropping and part not in DENOISERS))
            for g in gradients
        )
        if session.learns(part, step) and not arrived:
            raise NotLearning(
                f"No gradient reached the adapter in the {part}, so nothing can be learned. "
                f"The attention in use ({session.attention}) gives a wrong backward pass, or the settings freeze everything."
            )

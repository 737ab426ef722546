"""The validation loss, and whether a run ends early because of it."""

import math
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from trainer.data.examples import Example
from trainer.errors import OutOfMemory
from trainer.families.base import Batch
from trainer.models.device import send
from trainer.models.seeds import generator_for
from trainer.runs import convergence, run_status
from trainer.runs.events import (
    EndedEarly,
    Validated,
    Warned,
)
from trainer.training.session import Session
from trainer.training.step.losses import _conditioning, _losses, _mask, _scaled, _size_ids

VALIDATION_TIMESTEPS = 8  # of each picture, in one forward pass

FEW_IMAGES = (
    8  # below this the draws are compared one by one: the scatter of three means says too little
)

ENOUGH_IMAGES = 4  # below this each is measured more often, so that there are always 32 draws

COMPARED = 4  # training pictures that are measured beside those held out


def validation_losses(session: Session) -> list[float]:
    """On the held-out pictures at fixed noise and timesteps: the same weights always give the same numbers.

    The loss of a step depends mostly on its random timestep; only this one shows progress. One mean a picture; with few pictures one
    number for each draw of noise and timestep, and more of them where there are fewer still.
    """
    count = len(session.held_out)
    draws = VALIDATION_TIMESTEPS * math.ceil(ENOUGH_IMAGES / count)
    losses = [
        fixed_losses(session, example, index, draws)
        for index, example in enumerate(session.held_out)
    ]
    return (torch.stack(losses).mean(1) if count >= FEW_IMAGES else torch.cat(losses)).tolist()


def training_loss(session: Session) -> float | None:
    """Mean loss on a few training pictures, measured like those held out; None where these are training pictures themselves.

    It goes on falling while the held-out loss rises: the distance between the two is what was memorised.
    """
    names = {example.name for example in session.examples}
    if any(example.name in names for example in session.held_out):
        return None
    plain = [
        example
        for example in session.examples
        if example.resolution == session.run.dataset.resolution
    ]
    chosen = plain[:: max(1, len(plain) // COMPARED)][:COMPARED]
    return float(
        torch.stack(
            [fixed_losses(session, example, index) for index, example in enumerate(chosen)]
        ).mean()
    )


@torch.no_grad()
def fixed_losses(
    session: Session, example: Example, index: int = 0, draws: int = VALIDATION_TIMESTEPS
) -> Tensor:
    """Losses of one picture, [draws]: timesteps spread evenly, and the noise of this index."""
    places = (torch.arange(draws) + 0.5) / draws
    timesteps = session.objective.timesteps(send(places, session.device))
    noise = torch.randn(
        draws,
        *example.mean.shape,
        generator=generator_for(session.run.training.seed, "validation", index),
    )
    view = example.views[0]
    conditioning, sizes, mask = (
        _conditioning(session, [example.caption]),
        _size_ids(session, [view]),
        _mask(session, [view]),
    )
    losses = []
    for part in torch.arange(draws).chunk(
        session.fallbacks.pieces["validate"] * draws // VALIDATION_TIMESTEPS
    ):
        repeated = {name: t.expand(len(part), *t.shape[1:]) for name, t in conditioning.items()}
        batch = Batch(
            _scaled(session, view.mean.expand_as(noise[part])),
            repeated,
            sizes.expand(len(part), -1),
        )
        noised = session.objective.noised(
            batch.latents, send(noise[part], session.device), timesteps[part]
        )
        losses.append(_losses(session, batch, noised, mask))
    return torch.cat(losses)


def measure(session: Session, step: int) -> float | None:
    """The validation loss; None, with a warning, where it needs more memory than there is."""
    session.fallbacks.catch_up("validate", step)
    try:
        parts = session.fallbacks.attempt(
            "validate", step, lambda: validation_losses(session), VALIDATION_TIMESTEPS
        )
        compared = session.fallbacks.attempt(
            "validate", step, lambda: training_loss(session), VALIDATION_TIMESTEPS
        )
    except OutOfMemory:
        session.log.append(
            Warned(
                f"The validation loss of step {step} could not be measured for want of memory; the training goes on."
            )
        )
        return None
    loss = fmean(parts)
    session.log.append(Validated(step, loss, parts, compared))
    return loss


def ends_early(session: Session, step: int, saves: Sequence[int]) -> bool:
    """Whether the held-out loss has not fallen for as many saves as the settings allow. A save that a person asked for does not count,
    so that asking alters nothing; what was measured is read from the events, so that a resumed run decides alike."""
    patience = session.run.training.early_stop
    if not patience or step not in saves:
        return False
    status = run_status.read_status(session.folder)
    measured = [point for point in status.validations if point.step in saves]
    if not session.world.agree(
        bool(status.started and status.started.held_out)
        and convergence.has_stopped_improving(measured, patience)
    ):
        return False
    best = status.best_step or step
    session.log.append(
        EndedEarly(
            step,
            best,
            f"The loss on the held-out pictures has not fallen for {patience} saves, so the run ended at step {step} of "
            f"{session.total_steps}. The best save is that of step {best}.",
        )
    )
    return True

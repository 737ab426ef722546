"""The validation loss, and early stopping by it."""

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
from trainer.runs.events import EndedEarly, Validated, Warned
from trainer.training.session import Session
from trainer.training.step.losses import (
    conditioning_for,
    denoising_losses,
    mask_of,
    scaled_latents,
    size_ids_of,
)

VALIDATION_TIMESTEPS = 8
"""Noise levels per image, in one forward pass."""
MIN_IMAGES_FOR_MEANS = 8
"""Smaller validation sets are compared draw by draw: a standard error of three means is useless."""
MIN_IMAGES = 4
"""Smaller validation sets get more draws per image, so that there are always 32."""
COMPARED_IMAGES = 4
"""Training images whose loss is computed in the same way, to compare."""


def validate(session: Session, step: int) -> float | None:
    """Reports and returns the validation loss, or None with a warning if memory is too short."""
    fallbacks = session.fallbacks
    fallbacks.catch_up("validate", step)
    try:
        losses = fallbacks.attempt(
            "validate", step, lambda: validation_losses(session), VALIDATION_TIMESTEPS
        )
        on_training_images = fallbacks.attempt(
            "validate", step, lambda: training_loss(session), VALIDATION_TIMESTEPS
        )
    except OutOfMemory:
        session.log.append(
            Warned(
                f"There is too little memory for the validation loss of step {step}; "
                "the training continues without it."
            )
        )
        return None
    loss = fmean(losses)
    session.log.append(Validated(step, loss, losses, on_training_images))
    return loss


def validation_losses(session: Session) -> list[float]:
    """Returns one mean loss per image of the validation set, with fixed noise and timesteps.

    The same weights always give the same numbers. A training loss depends mostly on its random
    timestep, so only this loss shows progress. With fewer than MIN_IMAGES_FOR_MEANS images it
    returns every (noise, timestep) draw instead.
    """
    count = len(session.data.validation)
    draws = VALIDATION_TIMESTEPS * math.ceil(MIN_IMAGES / count)
    losses = [
        fixed_losses(session, example, index, draws)
        for index, example in enumerate(session.data.validation)
    ]
    compared = torch.stack(losses).mean(1) if count >= MIN_IMAGES_FOR_MEANS else torch.cat(losses)
    result: list[float] = compared.tolist()
    return result


def training_loss(session: Session) -> float | None:
    """Returns the mean loss on a few training images, with fixed noise and timesteps.

    It falls further while the validation loss rises: their distance is what was memorised. Returns
    None if the validation set consists of training images.
    """
    examples = session.data.examples
    names = {example.name for example in examples}
    if any(example.name in names for example in session.data.validation):
        return None
    resolution = session.run.dataset.resolution
    comparable = [example for example in examples if example.resolution == resolution]
    stride = max(1, len(comparable) // COMPARED_IMAGES)
    chosen = comparable[::stride][:COMPARED_IMAGES]
    losses = [fixed_losses(session, example, index) for index, example in enumerate(chosen)]
    return float(torch.stack(losses).mean())


def fixed_losses(
    session: Session, example: Example, index: int = 0, draws: int = VALIDATION_TIMESTEPS
) -> Tensor:
    """Returns losses of one image, [draws], at evenly spread timesteps.

    The noise depends on the seed and on `index`, so each image of a set gets its own.
    """
    noise_levels = (torch.arange(draws) + 0.5) / draws
    generator = generator_for(session.run.training.seed, "validation", index)
    noise = torch.randn(draws, *example.mean.shape, generator=generator)
    with torch.no_grad():
        return _losses_at(session, example, noise_levels, noise)


def _losses_at(session: Session, example: Example, noise_levels: Tensor, noise: Tensor) -> Tensor:
    """Returns the loss of one image at each noise level (0 to 1) with its noise, [draws]."""
    draws = len(noise_levels)
    objective = session.model.objective
    timesteps = objective.timesteps(send(noise_levels, session.device))
    view = example.views[0]
    conditioning = conditioning_for(session, [example.caption])
    size_ids = size_ids_of(session, [view])
    mask = mask_of(session, [view])

    # If memory is short, the draws go through the model in several pieces.
    pieces = session.fallbacks.pieces["validate"] * draws // VALIDATION_TIMESTEPS
    losses = []
    for piece in torch.arange(draws).chunk(pieces):
        repeated = {
            name: tensor.expand(len(piece), *tensor.shape[1:])
            for name, tensor in conditioning.items()
        }
        latents = scaled_latents(session, view.mean.expand_as(noise[piece]))
        batch = Batch(latents, repeated, size_ids.expand(len(piece), -1))
        noised = objective.noised(latents, send(noise[piece], session.device), timesteps[piece])
        losses.append(denoising_losses(session, batch, noised, mask))
    return torch.cat(losses)


def ends_early(session: Session, step: int, save_steps: Sequence[int]) -> bool:
    """Returns whether the validation loss stopped improving for `training.early_stop` saves.

    Only planned saves count, so a save on request changes nothing. The losses are read from the
    events, so a resumed run decides alike.
    """
    patience = session.run.training.early_stop
    if not patience or step not in save_steps:
        return False
    status = run_status.read_status(session.folder)
    has_validation_set = bool(status.started and status.started.held_out)
    validations = [point for point in status.validations if point.step in save_steps]
    is_over = has_validation_set and convergence.has_stopped_improving(validations, patience)
    if not session.world.agree(is_over):
        return False
    best = status.best_step or step
    session.log.append(
        EndedEarly(
            step,
            best,
            f"The validation loss has not fallen for {patience} saves, so the run ended at step "
            f"{step} of {session.total_steps}. The best save is from step {best}.",
        )
    )
    return True

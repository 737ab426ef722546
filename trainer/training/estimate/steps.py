"""Steps and saves of a run, and forward passes in a step."""

import math
from collections.abc import Sequence

from trainer.config import RunConfig
from trainer.data.scan import held_out_count, resolutions


def total_steps(run: RunConfig, views: int) -> int:
    """Returns the optimiser steps of a run.

    `views` is the number of training images in one epoch, at all resolutions and with repeats.
    """
    training = run.training
    if training.steps:
        return training.steps
    images_per_step = training.images_per_step
    return max(1, math.ceil(views * training.views_per_picture / images_per_step))


def steps_for(run: RunConfig, repeats: Sequence[int]) -> int:
    """Returns the optimiser steps for a dataset, given the repeats of each image.

    The validation set does not count. Which images are in it is drawn when the run starts, so the
    mean number of repeats is assumed.
    """
    images = len(repeats)
    trained_fraction = 1 - held_out_count(run, images) / max(1, images)
    return total_steps(run, round(sum(repeats) * trained_fraction) * len(resolutions(run)))


def save_steps(total: int, saves: int) -> list[int]:
    """Returns the steps after which the adapter is saved: `saves` equal parts of the run."""
    return sorted({max(1, round(total * part / saves)) for part in range(1, saves + 1)})


def images_per_pass(run: RunConfig) -> int:
    """Returns the images in a forward pass of one device.

    Several devices split a microbatch if whole ones cannot be distributed evenly
    (`World.shares`).
    """
    training = run.training
    pieces = training.devices // math.gcd(training.devices, training.gradient_accumulation_steps)
    return math.ceil(training.batch_size / pieces)


def passes_per_image(run: RunConfig) -> int:
    """Returns how often a step passes through the model per image, forward and backward.

    Once for the image, once for its class image, and once for prior preservation.
    """
    has_class_images = bool(run.dataset.regularisation_folder)
    preserves_prior = bool(run.objective.prior_preservation)
    return 1 + has_class_images + preserves_prior

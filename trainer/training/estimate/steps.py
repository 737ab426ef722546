"""Steps and saves of a run."""

import math
from collections.abc import Sequence

from trainer.config import RunConfig
from trainer.data.scan import held_out_count, resolutions


def total_steps(run: RunConfig, views: int) -> int:
    """Optimiser steps of a run whose training pictures count `views` per pass (repeats included)."""
    training = run.training
    if training.steps:
        return training.steps
    return max(
        1,
        math.ceil(
            views
            * training.views_per_picture
            / (training.batch_size * training.gradient_accumulation_steps)
        ),
    )


def steps_for(run: RunConfig, repeats: Sequence[int]) -> int:
    """Optimiser steps for a dataset, those held out not counted; `repeats` of each picture. Which are held out is drawn later."""
    trained = 1 - held_out_count(run, len(repeats)) / max(1, len(repeats))
    return total_steps(run, round(sum(repeats) * trained) * len(resolutions(run)))


def save_steps(total: int, saves: int) -> list[int]:
    """The steps after which the adapter is saved: `saves` equal parts, the last one at the end."""
    return sorted({max(1, round(total * part / saves)) for part in range(1, saves + 1)})


def images_per_pass(run: RunConfig) -> int:
    """Pictures in a forward pass of one device: several cut a microbatch where they cannot deal out whole ones (`World.shares`)."""
    training = run.training
    pieces = training.devices // math.gcd(training.devices, training.gradient_accumulation_steps)
    return math.ceil(training.batch_size / pieces)


def passes_per_image(run: RunConfig) -> int:
    """Of a step, each forward and backward: of the picture, its class picture, and its caption without the trigger."""
    return 1 + bool(run.dataset.regularisation_folder) + bool(run.objective.prior_preservation)

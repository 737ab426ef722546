"""Learning-rate schedules, by name, with a warm-up."""

import math
from collections.abc import Callable

import torch

from trainer.config import RunConfig
from trainer.errors import ConfigError


def _constant(progress: float, run: RunConfig) -> float:
    return 1.0


def _linear(progress: float, run: RunConfig) -> float:
    return 1.0 - progress


def _cosine(progress: float, run: RunConfig) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _cosine_with_restarts(progress: float, run: RunConfig) -> float:
    if progress == 1:
        return 0.0
    return _cosine(progress * run.training.lr_cycles % 1, run)


def _polynomial(progress: float, run: RunConfig) -> float:
    return float((1.0 - progress) ** run.training.lr_power)


SCHEDULES: dict[str, Callable[[float, RunConfig], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
}
"""Factor on the learning rate by progress after the warm-up, 0 to 1."""


def warmup_steps(run: RunConfig, total: int) -> int:
    """Returns the number of warm-up steps. Raises ConfigError if the run is not longer."""
    warmup = run.training.warmup
    if warmup < 1:
        return math.ceil(warmup * total)
    steps = int(warmup)
    if steps >= total:
        raise ConfigError(
            f"training.warmup: a warm-up of {steps} steps does not fit into a run of {total}; "
            "make it shorter."
        )
    return steps


def lr_factor(run: RunConfig, step: int, total: int) -> float:
    """Returns the factor on the learning rate of step 1 to `total`.

    It rises during the warm-up, then follows the schedule, which ends in the last step. As a
    function of the step alone it needs no state for resuming.
    """
    warmup = warmup_steps(run, total)
    if step <= warmup:
        return step / (warmup + 1)
    progress = (step - 1 - warmup) / max(1, total - 1 - warmup)
    return SCHEDULES[run.training.lr_schedule](progress, run)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Sets every group's learning rate to its initial one times `factor`.

    Returns the learning rate of the first group.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])

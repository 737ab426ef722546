"""Learning-rate schedules."""

import math
from collections.abc import Callable

import torch

from trainer.config import RunConfig
from trainer.errors import ConfigError

SCHEDULES: dict[str, Callable[[float, RunConfig], float]] = {
    "constant": lambda progress, run: 1.0,
    "linear": lambda progress, run: 1.0 - progress,
    "cosine": lambda progress, run: 0.5 * (1 + math.cos(math.pi * progress)),
    "cosine_with_restarts": lambda progress, run: (
        0.0
        if progress == 1
        else 0.5 * (1 + math.cos(math.pi * (progress * run.training.lr_cycles % 1)))
    ),
    "polynomial": lambda progress, run: (1.0 - progress) ** run.training.lr_power,
}


def warmup_steps(run: RunConfig, total: int) -> int:
    """Raises ConfigError where the warm-up would outlast the run."""
    warmup = run.training.warmup
    steps = math.ceil(warmup * total) if warmup < 1 else int(warmup)
    if warmup >= 1 and steps >= total:
        raise ConfigError(
            f"training.warmup: a warm-up of {steps} steps does not fit into a run of {total}; make it shorter."
        )
    return steps


def lr_factor(run: RunConfig, step: int, total: int) -> float:
    """What the learning rate of step 1 to `total` is multiplied with: rises over the warm-up, then follows the schedule.

    A schedule that falls to zero is there in the last step, if there is more than one. A function of the step alone, so there is
    nothing to store for resuming.
    """
    warmup = warmup_steps(run, total)
    if step <= warmup:
        return step / (warmup + 1)
    return SCHEDULES[run.training.lr_schedule](
        (step - 1 - warmup) / max(1, total - 1 - warmup), run
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Returns the learning rate of the first group."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return optimizer.param_groups[0]["lr"]

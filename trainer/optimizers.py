"""Optimisers and learning-rate schedules, by name."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from trainer.config import RunConfig

OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], RunConfig], torch.optim.Optimizer]] = {
    "adamw": lambda groups, run: torch.optim.AdamW(groups, weight_decay=run.training.weight_decay, foreach=True),
}

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}


def build_optimizer(parameters: Iterable[tuple[list[torch.nn.Parameter], float]], run: RunConfig) -> torch.optim.Optimizer:
    """One group for each (parameters, learning rate); groups with a rate of 0 are left out."""
    groups = [{"params": group, "lr": rate, "initial_lr": rate} for group, rate in parameters if rate > 0 and group]
    return OPTIMIZERS[run.training.optimizer](groups, run)


def lr_factor(run: RunConfig, step: int, total: int) -> float:
    """What the learning rate of step 1 to `total` is multiplied with: rises over the warm-up, then follows the schedule.

    A function of the step alone, so there is nothing to store for resuming.
    """
    warmup = math.ceil(run.training.warmup * total)
    if step <= warmup:
        return step / (warmup + 1)
    return SCHEDULES[run.training.lr_schedule]((step - 1 - warmup) / max(1, total - warmup))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Returns the learning rate of the first group."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return optimizer.param_groups[0]["lr"]

"""What the measurements of a run say: which save is the best one, and when more steps no longer help. Reads events only."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from trainer.events import Validated


def worse_by(one: Validated, other: Validated) -> tuple[float, float]:
    """How much higher the held-out loss of one is, and the standard error of that.

    Both were measured on the same pictures, noise and timesteps, so their parts are compared in pairs: what makes a picture or a
    timestep hard cancels out, and a difference far smaller than the scatter of the losses can be told.
    """
    pairs = list(zip(one.parts, other.parts, strict=False))
    if len(pairs) < 2:
        return one.loss - other.loss, 0.0
    differences = [mine - theirs for mine, theirs in pairs]
    return fmean(differences), stdev(differences) / math.sqrt(len(differences))


def is_worse(one: Validated, other: Validated) -> bool:
    """Whether the held-out loss of one is above the other's by more than the standard error of their difference."""
    more, error = worse_by(one, other)
    return more > error


def best_save(saves: Sequence[Validated]) -> Validated | None:
    """The latest save whose held-out loss is not measurably above the lowest one.

    Not simply the lowest: where the loss has gone flat, chance would choose, and of saves that are as good on pictures they never saw
    the one with more training knows its subject better. Where it has risen for good, all later saves are worse and the choice is early.
    With few held-out pictures the error is that of the draws of noise over these pictures alone (32 at least), and says nothing of others.
    """
    if not saves:
        return None
    lowest = min(saves, key=lambda save: save.loss)
    return [save for save in saves if not is_worse(save, lowest)][-1]


def has_run_dry(saves: Sequence[Validated], patience: int) -> bool:
    """Whether the last `patience` saves did not lower the held-out loss (early stopping with patience)."""
    if not patience or len(saves) <= patience:
        return False
    losses = [save.loss for save in saves]
    return min(losses[:-patience]) <= min(losses[-patience:])

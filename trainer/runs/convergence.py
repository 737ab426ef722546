"""Convergence of a run: its best save, early stopping, and advice for the next run.

Pure arithmetic on `Validated` events; nothing here reads a file or imports torch.
"""

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from trainer.config import Adapter, RunConfig
from trainer.runs.events import Validated

# The thresholds were chosen on recorded runs of the embedded base (tests/recorded/guidance).
MIN_FALL = 0.02
"""A run has learned something if its loss fell by this fraction of the base's own loss."""
STILL_FALLING = 0.03
"""A loss still falls if more than this fraction of its total fall happened recently."""
RECENT_STEPS = 0.25
"""The fraction of the steps that counts as recent."""
TOLERATED_RISE = 0.05
"""A loss has risen if it is above its lowest by more than this fraction of its total fall."""
LONG_RUN = 2 * 3600.0
"""Seconds. A run that takes longer gets advice on how to make it faster."""

START_OF_GAUGE = 0.05
WIDER_TARGETS = {
    "attention": "attention+feed-forward",
    "attention+feed-forward": "linear",
    "linear": "linear+conv",
}


def loss_difference(one: Validated, other: Validated) -> tuple[float, float]:
    """Returns how much higher the first validation loss is, and the standard error of that.

    Both validations used the same images, noise and timesteps, so their parts are compared in
    pairs. The difficulty of an image or a timestep cancels out, and a difference far smaller
    than the spread of the losses becomes visible.

    A loss that is not finite is the worst: the adapter overflows in half precision.
    """
    if not math.isfinite(one.loss):
        return math.inf, 0.0
    differences = [a - b for a, b in zip(one.parts, other.parts, strict=False)]
    count = len(differences)
    if count < 2:
        return one.loss - other.loss, 0.0
    mean = fmean(differences)
    # statistics.stdev computes with exact fractions: too slow for a page that calls this often.
    squares = sum((difference - mean) ** 2 for difference in differences)
    return mean, math.sqrt(squares / (count - 1) / count)


def is_worse(one: Validated, other: Validated) -> bool:
    """Whether the first validation loss is higher by more than the standard error."""
    difference, error = loss_difference(one, other)
    return difference > error


def has_risen(one: Validated, lowest: Validated, first: Validated) -> bool:
    """Whether a validation loss is measurably above the lowest and above `TOLERATED_RISE`.

    With a small validation set, a measurable rise on these few images means little for others.
    Only a rise that is also large compared with the whole fall counts.
    """
    fallen = max(0.0, first.loss - lowest.loss)
    return is_worse(one, lowest) and one.loss - lowest.loss > TOLERATED_RISE * fallen


def best_save(validations: Sequence[Validated], steps: Container[int]) -> Validated | None:
    """Returns the latest of the saves at these steps whose loss has not risen, or None.

    Simply taking the lowest loss would leave the choice to chance once the loss is flat. Of saves
    that do equally well on unseen images, the one with more training knows its subject better.
    If the loss rises for good, all later saves are worse and an early one is chosen.
    """
    finite = [point for point in validations if math.isfinite(point.loss)]
    saves = [point for point in finite if point.step in steps]
    if not saves:
        return None
    lowest = min(saves, key=lambda save: save.loss)
    return [save for save in saves if not has_risen(save, lowest, finite[0])][-1]


def has_stopped_improving(saves: Sequence[Validated], patience: int) -> bool:
    """Whether none of the last `patience` saves has a lower loss than all saves before them."""
    if not patience or len(saves) <= patience:
        return False
    losses = [save.loss if math.isfinite(save.loss) else math.inf for save in saves]
    return min(losses[:-patience]) <= min(losses[-patience:])


@dataclass(frozen=True)
class Assessment:
    """What the losses on the validation set and on the training images show together."""

    zone: Literal["learning", "ready", "memorising"]
    gauge: float
    """From 0, just begun, to 1, mostly memorised. Each zone is a third."""
    sentence: str
    problem: Literal["", "underfit", "overfit", "diverging"] = ""


def assess(validations: Sequence[Validated], ended: bool = False) -> Assessment | None:
    """Assesses a run from all its validations; the base's own, at step 0, comes first.

    While the validation loss falls, the adapter learns what also holds for unseen images. When it
    is flat, the run is ready. If it rises while the loss on training images still falls, the run
    memorises them.

    Returns None before the first save, and without a validation set.
    """
    compared = [point for point in validations if point.training_loss is not None]
    if compared and not math.isfinite(compared[-1].loss):
        return _diverging(f"The loss at step {compared[-1].step} is not a finite number")
    points = [point for point in compared if math.isfinite(point.loss)]
    if len(points) < 2:
        return None
    first, last = points[0], points[-1]
    lowest = min(points, key=lambda point: point.loss)
    if first.loss - lowest.loss < MIN_FALL * first.loss:
        return _assess_without_fall(first, last, ended)
    if has_risen(last, lowest, first):
        return _assess_rise(first, lowest, last)
    return _assess_fall(points, lowest, ended)


def _diverging(observation: str) -> Assessment:
    sentence = f"{observation}: the learning rate is too high."
    return Assessment("learning", START_OF_GAUGE, sentence, "diverging")


def _progress(ended: bool) -> str:
    return "the run has ended" if ended else "the run continues"


def _assess_without_fall(first: Validated, last: Validated, ended: bool) -> Assessment:
    """Assesses a run whose loss never fell by `MIN_FALL`."""
    if is_worse(last, first):
        return _diverging("The loss rises instead of falling")
    sentence = f"The validation loss has hardly fallen so far, and {_progress(ended)}."
    return Assessment("learning", START_OF_GAUGE, sentence, "underfit" if ended else "")


def _assess_rise(first: Validated, lowest: Validated, last: Validated) -> Assessment:
    """Assesses a run whose validation loss is clearly above its lowest."""
    training = [point.training_loss or 0.0 for point in (first, lowest, last)]
    if training[2] > training[1]:
        return _diverging(f"Both losses rise since step {lowest.step}")
    rise = (last.loss - lowest.loss) / (first.loss - lowest.loss)
    sentence = (
        f"Since step {lowest.step} the validation loss rises "
        f"({last.loss / lowest.loss - 1:+.0%}), while the loss on training images still falls "
        f"(to {training[2] / training[0]:.0%} of the base's): "
        "the adapter memorises them."
    )
    return Assessment("memorising", 2 / 3 + min(1.0, rise) / 3, sentence, "overfit")


def _assess_fall(points: Sequence[Validated], lowest: Validated, ended: bool) -> Assessment:
    """Assesses a run whose validation loss has fallen and not risen: still learning, or ready."""
    first, last = points[0], points[-1]
    total_fall = first.loss - lowest.loss
    # The last validation before the recent steps. With few saves it may be the base's.
    early = [point for point in points if point.step <= (1 - RECENT_STEPS) * last.step]
    before = early[-1] if early else first
    recent_fall = (before.loss - last.loss) / total_fall
    change = f"{last.loss / first.loss - 1:+.0%}"
    if recent_fall > STILL_FALLING and (before is first or is_worse(before, last)):
        sentence = f"The validation loss still falls ({change} so far), and {_progress(ended)}."
        gauge = (1 - min(1.0, recent_fall)) / 3
        return Assessment("learning", gauge, sentence, "underfit" if ended else "")
    rise = max(0.0, (last.loss - lowest.loss) / total_fall)
    sentence = (
        f"The validation loss has settled ({change} against the base): more steps add little."
    )
    return Assessment("ready", 1 / 3 + min(1.0, rise / TOLERATED_RISE) / 3, sentence)


def suggest_changes(run: RunConfig, assessment: Assessment, seconds: float = 0.0) -> list[str]:
    """Returns changes to try in the next run, with this run's numbers.

    `seconds` is how long the whole run takes.
    """
    suggestions: list[str] = []
    if assessment.problem == "underfit":
        suggestions += _against_underfitting(run)
    if assessment.problem == "overfit":
        suggestions += _against_overfitting(run)
    if assessment.problem == "diverging":
        rate = run.training.learning_rate
        suggestions.append(f"lower the learning rate ({rate:g} to {rate / 3:.2g})")
    if seconds > LONG_RUN:
        suggestions.append(f"to be faster: {', '.join(_against_slowness(run))}")
    return suggestions


def _against_underfitting(run: RunConfig) -> list[str]:
    adapter, rate = run.adapter, run.training.learning_rate
    suggestions = []
    if adapter.rank < 128:
        suggestions.append(f"raise the rank ({adapter.rank} to {2 * adapter.rank})")
    wider = WIDER_TARGETS.get(adapter.targets)
    if wider and not adapter.target_pattern:
        suggestions.append(f"add targets ({adapter.targets} to {wider})")
    # Optimizers that find their own learning rate have 1 here; raising it would be wrong.
    if 0 < 1.5 * rate <= 1:
        suggestions.append(f"raise the learning rate ({rate:g} to {1.5 * rate:.2g})")
    return [*suggestions, "train longer"]


def _against_overfitting(run: RunConfig) -> list[str]:
    suggestions = []
    if run.saving.main == "last":
        suggestions.append("use the save marked with a star")
    suggestions.append("train fewer steps")
    if run.adapter.rank > 4:
        suggestions.append(f"lower the rank ({run.adapter.rank} to {run.adapter.rank // 2})")
    if _can_raise_dropout(run.adapter):
        suggestions.append("more dropout (0.1)")
    return [*suggestions, "more images"]


def _can_raise_dropout(adapter: Adapter) -> bool:
    return adapter.dropout < 0.1 and adapter.kind not in ("loha", "lokr")


def _against_slowness(run: RunConfig) -> list[str]:
    suggestions = []
    if run.adapter.targets != "attention":
        suggestions.append("fewer targets")
    if run.adapter.rank > 16:
        suggestions.append("a lower rank")
    if run.training.gradient_checkpointing:
        suggestions.append("gradient checkpointing off")
    return [*suggestions, "a bigger batch"]

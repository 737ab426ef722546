"""What the measurements of a run say: which save is the best one, when more steps no longer help, and what to change. Reads events only."""

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from trainer.config import RunConfig
from trainer.runs.events import Validated


def worse_by(one: Validated, other: Validated) -> tuple[float, float]:
    """How much higher the held-out loss of one is, and the standard error of that.

    Both were measured on the same pictures, noise and timesteps, so their parts are compared in pairs: what makes a picture or a
    timestep hard cancels out, and a difference far smaller than the scatter of the losses can be told. A loss that is no finite number,
    of an adapter that overflows half precision, is the worst.
    """
    if not math.isfinite(one.loss):
        return math.inf, 0.0
    pairs = list(zip(one.parts, other.parts, strict=False))
    if len(pairs) < 2:
        return one.loss - other.loss, 0.0
    differences = [mine - theirs for mine, theirs in pairs]
    more = fmean(differences)
    scatter = sum(
        (each - more) ** 2 for each in differences
    )  # statistics.stdev is exact and slow; the page asks each second
    return more, math.sqrt(scatter / (len(pairs) - 1) / len(pairs))


def is_worse(one: Validated, other: Validated) -> bool:
    """Whether the held-out loss of one is above the other's by more than the standard error of their difference."""
    more, error = worse_by(one, other)
    return more > error


def has_risen(one: Validated, lowest: Validated, first: Validated) -> bool:
    """Whether a held-out loss is measurably above the lowest, and by more than a small share of all that it has fallen since the first.

    With few held-out pictures a loss that is measurably higher on these says little of others; one that is clearly higher says more.
    """
    return is_worse(one, lowest) and one.loss - lowest.loss > RISEN * max(
        0.0, first.loss - lowest.loss
    )


def best_save(measured: Sequence[Validated], steps: Container[int]) -> Validated | None:
    """The latest of the saves at these steps whose held-out loss has not risen above the lowest one.

    Not simply the lowest: where the loss has gone flat, chance would choose, and of saves that are as good on pictures they never saw
    the one with more training knows its subject better. Where it has risen for good, all later saves are worse and the choice is early.
    """
    finite = [point for point in measured if math.isfinite(point.loss)]
    saves = [point for point in finite if point.step in steps]
    if not saves:
        return None
    lowest = min(saves, key=lambda save: save.loss)
    return [save for save in saves if not has_risen(save, lowest, finite[0])][-1]


def has_run_dry(saves: Sequence[Validated], patience: int) -> bool:
    """Whether the last `patience` saves did not lower the held-out loss (early stopping with patience)."""
    if not patience or len(saves) <= patience:
        return False
    losses = [save.loss if math.isfinite(save.loss) else math.inf for save in saves]
    return min(losses[:-patience]) <= min(losses[-patience:])


STILL_FALLING = 0.03  # of all that the held-out loss has fallen, in the last quarter of the steps
RISEN = 0.05  # of all that it has fallen, above its lowest
HARDLY = 0.02  # of the base's own loss
SLOW = 2 * 3600  # seconds


@dataclass(frozen=True)
class Reading:
    """What the held-out loss and that of the training pictures say together."""

    zone: Literal["learning", "ready", "memorising"]
    needle: float
    """Where it stands from 0, just begun, to 1, mostly memorised; each zone is a third."""
    sentence: str
    fault: Literal["", "weak", "overfit", "burning"] = ""


def read(measured: Sequence[Validated], ended: bool = False) -> Reading | None:
    """What has been measured so far, the base at step 0 first; None before the first save, and where no pictures are held out.

    While the held-out loss falls, what is learned holds for pictures that were never seen. When it is flat the work is done. When it
    rises while the loss on the training pictures goes on falling, only these are learned (the thresholds were chosen on the small base).
    """
    training = {
        point.step: point.training_loss for point in measured if point.training_loss is not None
    }
    points = [point for point in measured if point.step in training]
    if points and not math.isfinite(points[-1].loss):
        return Reading(
            "learning",
            0.05,
            f"The loss at step {points[-1].step} is no finite number: the learning rate is too high.",
            "burning",
        )
    points = [point for point in points if math.isfinite(point.loss)]
    if len(points) < 2:
        return None
    first, last, lowest = points[0], points[-1], min(points, key=lambda point: point.loss)
    fallen = first.loss - lowest.loss
    before = [first, *(point for point in points if point.step <= 0.75 * last.step)][-1]
    ends = "ended" if ended else "goes on"
    if fallen < HARDLY * first.loss:
        burning = is_worse(last, first)
        said = (
            "The loss rises instead of falling: the learning rate is too high."
            if burning
            else f"The loss on held-out pictures has hardly fallen yet, and the run {ends}."
        )
        return Reading("learning", 0.05, said, "burning" if burning else "weak" if ended else "")
    risen = (last.loss - lowest.loss) / fallen
    if has_risen(last, lowest, first):
        if training[last.step] > training[lowest.step]:
            return Reading(
                "learning",
                0.05,
                f"Since step {lowest.step} both losses rise: the learning rate is too high.",
                "burning",
            )
        sentence = (
            f"Since step {lowest.step} the loss falls only on the training pictures ({training[last.step] / training[first.step]:.0%} of "
            f"the base's) and rises on the others ({last.loss / lowest.loss - 1:+.0%}): it copies them."
        )
        return Reading("memorising", 2 / 3 + min(1.0, risen) / 3, sentence, "overfit")
    falls = (before.loss - last.loss) / fallen
    if falls > STILL_FALLING and (before is first or is_worse(before, last)):
        sentence = f"The loss on held-out pictures still falls ({last.loss / first.loss - 1:+.0%} so far), and the run {ends}."
        return Reading("learning", (1 - min(1.0, falls)) / 3, sentence, "weak" if ended else "")
    sentence = f"The loss on held-out pictures has settled ({last.loss / first.loss - 1:+.0%} against the base): more steps add little."
    return Reading("ready", 1 / 3 + min(1.0, max(0.0, risen) / RISEN) / 3, sentence)


def what_to_change(run: RunConfig, reading: Reading, seconds: float = 0.0) -> list[str]:
    """The classic rules, with the numbers of this run. `seconds` is how long a whole run takes."""
    adapter, training, found = run.adapter, run.training, []
    wider = {
        "attention": "attention+feed-forward",
        "attention+feed-forward": "linear",
        "linear": "linear+conv",
    }.get(adapter.targets)
    if reading.fault == "weak":
        found += (
            [f"raise the rank ({adapter.rank} to {2 * adapter.rank})"] if adapter.rank < 128 else []
        )
        found += (
            [f"add targets ({adapter.targets} to {wider})"]
            if wider and not adapter.target_pattern
            else []
        )
        higher = 1.5 * training.learning_rate
        found += (
            [f"raise the learning rate ({training.learning_rate:g} to {higher:.2g})"]
            if 0 < higher <= 1
            else []
        )
        found += ["train longer"]
    if reading.fault == "overfit":
        found += ["take the save with the star"] if run.saving.main == "last" else []
        found += ["train fewer steps"]
        found += (
            [f"lower the rank ({adapter.rank} to {adapter.rank // 2})"] if adapter.rank > 4 else []
        )
        found += (
            ["more dropout (0.1)"]
            if adapter.dropout < 0.1 and adapter.kind not in ("loha", "lokr")
            else []
        )
        found += ["more pictures"]
    if reading.fault == "burning":
        found += [
            f"lower the learning rate ({training.learning_rate:g} to {training.learning_rate / 3:.2g})"
        ]
    if seconds > SLOW:
        faster = ["fewer targets"] if adapter.targets != "attention" else []
        faster += ["a lower rank"] if adapter.rank > 16 else []
        faster += ["gradient checkpointing off"] if training.gradient_checkpointing else []
        found.append(f"to be faster: {', '.join([*faster, 'a bigger batch'])}")
    return found

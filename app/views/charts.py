"""Curves over the steps of a run, and what its adapter learned."""

import json
import math
import statistics
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from app.jobs import runs
from app.views.records import CurveView, EmptyView, LearnedView, Point

MAX_LOSSES = 150
MAX_RATES = 100
SMOOTHING_WINDOWS = 20
"""How many windows a run has. Losses are smoothed over a window."""


def curve_view() -> CurveView | EmptyView:
    """Returns the losses of the run that is shown.

    The curves are thinned, so that a long run costs the browser no more than a short one.
    """
    folder = runs.shown()
    if folder is None:
        return {}
    current = runs.status(folder)
    if not current.losses:
        return {}
    training = [
        (point.step, point.training_loss)
        for point in current.validations
        if point.training_loss is not None and math.isfinite(point.training_loss)
    ]
    return {
        "total": current.total_steps,
        "loss": thin(current.losses, MAX_LOSSES),
        "smooth": thin(smooth(current.losses), MAX_LOSSES),
        "validation": current.validation_losses,
        "training": training,
        "rates": thin(current.learning_rates, MAX_RATES),
        "saves": sorted({saved.step for saved in current.adapters}),
        "best": current.best_step,
    }


def thin(points: Sequence[Point], limit: int = MAX_LOSSES) -> list[Point]:
    """Returns at most `limit` points: the means of neighbours, at the last step of each group."""
    width = max(1, -(-len(points) // limit))
    thinned = []
    for start in range(0, len(points), width):
        group = points[start : start + width]
        mean = statistics.fmean(value for _, value in group)
        thinned.append((group[-1][0], float(f"{mean:.4g}")))
    return thinned


def smooth(points: Sequence[Point], length: int = 0) -> list[Point]:
    """Returns the exponential moving mean over a twentieth of the run.

    The mean is corrected for its start, so the first values do not pull it.

    Args:
        points: Steps and losses.
        length: How many steps the run has. 0: as many as there are points.
    """
    window = max(2.0, (length or len(points)) / SMOOTHING_WINDOWS)
    decay = 1 - 1 / window
    total = weight = 0.0
    smoothed = []
    for step, loss in points:
        total = decay * total + loss
        weight = decay * weight + 1
        smoothed.append((step, total / weight))
    return smoothed


def learned_view() -> LearnedView | EmptyView:
    """Returns which blocks the shown run's adapter changes, and how much of its rank it uses."""
    folder = runs.shown()
    if folder is None:
        return {}
    current = runs.status(folder)
    if current.is_active or not current.adapters:
        return {}
    path = folder / "learned.json"
    try:
        return _read_learned(path, path.stat().st_mtime_ns)
    except (OSError, ValueError):  # written by an older version, or missing
        return {}


@lru_cache(maxsize=32)
def _read_learned(path: Path, modified: int) -> LearnedView:
    """Reads learned.json once: it has thousands of numbers, and each open page reads it often."""
    content = json.loads(path.read_text(encoding="utf-8"))
    modules = [module for module in content["modules"] if "enough" in module]
    modules.sort(key=lambda module: -module["enough"]["99"])
    return {
        "run": path.parent.name,
        "blocks": content["blocks"],
        "rank": content.get("rank", 0),
        "spectrum": content.get("spectrum", []),
        "enough": content.get("enough", {}),
        "modules": [_module_row(module) for module in modules],
    }


def _module_row(module: dict[str, Any]) -> tuple[str, int, int, int]:
    enough = module["enough"]
    return module["name"], len(module["values"]), enough["95"], enough["99"]

"""Whether a run still learns or memorises its images, and what to change."""

from pathlib import Path

from app.jobs import runs
from app.views.records import Gauge
from trainer.errors import TrainerError
from trainer.runs import convergence
from trainer.runs.run_status import RunStatus


def gauge(folder: Path, current: RunStatus) -> Gauge | None:
    """Returns the state of learning, or None if the losses do not show it."""
    reading = current.assessment
    if reading is None:
        return None
    total_seconds = (current.seconds_per_step or 0.0) * current.total_steps
    try:
        changes = convergence.suggest_changes(runs.settings(folder), reading, total_seconds)
    except TrainerError:
        changes = []
    return {
        "zone": reading.zone,
        "needle": round(reading.gauge, 3),
        "sentence": reading.sentence,
        "changes": changes,
    }

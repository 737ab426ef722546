"""The name and the state of a run in words."""

from pathlib import Path

from app.jobs import runs
from trainer.errors import TrainerError
from trainer.runs import run_requests
from trainer.runs.run_status import RunStatus

STATES = {
    "new": "Not started",
    "queued": "Waiting",
    "waiting": "Waiting for the device",
    "loading": "Loading the model",
    "downloading": "Downloading the model",
    "caching": "Reading the images",
    "sampling": "Drawing samples",
    "training": "Training",
    "paused": "Paused",
    "stopping": "Saving and stopping",
    "stopped": "Stopped",
    "finished": "Finished",
    "failed": "Failed",
    "interrupted": "Interrupted",
}
TONES = {
    "finished": "good",
    "failed": "bad",
    "interrupted": "bad",
    "paused": "warn",
    "stopped": "warn",
    "queued": "quiet",
    "new": "quiet",
}
"""The style of a state in style.css. All others are "busy"."""


def title(folder: Path) -> str:
    """Returns the name of a run, or of its folder if its settings cannot be read."""
    try:
        return runs.settings(folder).name
    except TrainerError:
        return folder.name


def state_label(folder: Path, current: RunStatus) -> str:
    """Returns the state of a run in words."""
    if current.state == "queued" and _is_next(folder):
        return "Starting"
    return STATES.get(current.state, current.state.capitalize())


def tone(current: RunStatus) -> str:
    """Returns the style of a run's state: good, bad, warn, quiet or busy."""
    return TONES.get(current.state, "busy")


def _is_next(folder: Path) -> bool:
    return runs.active() is None and run_requests.queue()[:1] == [folder]

"""The line above the tabs."""

from app.jobs import runs
from app.views import formatting, labels
from app.views.records import HeaderView
from trainer.runs.run_status import RunStatus


def header_view(device: str) -> HeaderView:
    """Returns what is being trained and on which device."""
    folder = runs.shown()
    idle: HeaderView = {"device": device, "text": "Idle", "tone": "quiet"}
    if folder is None:
        return idle
    current = runs.status(folder)
    if not (current.is_active or current.state == "queued"):
        return {
            **idle,
            "run": folder.name,
            "name": labels.title(folder),
            "state": current.state,
        }
    return {
        "device": device,
        "text": labels.state_label(folder, current) + _progress(current),
        "tone": labels.tone(current),
        "busy": current.is_active,
        "run": folder.name,
    }


def _progress(current: RunStatus) -> str:
    """Returns a text such as " 40 % · 3 min left"."""
    if current.state != "training" or not current.total_steps:
        return ""
    text = f" {100 * current.step // current.total_steps} %"
    if current.seconds_left is not None:
        text += f" · {formatting.duration(current.seconds_left)} left"
    return text

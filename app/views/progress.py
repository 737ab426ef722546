"""The status card of the Train tab."""

import statistics
from pathlib import Path

from app.jobs import device, queue, run_actions, runs
from app.views import files, formatting, labels
from app.views.gauge import gauge
from app.views.records import EmptyView, Measurements, ProgressView, QueuedRun
from trainer.runs.run_status import RunStatus

PHASES = ("loading", "downloading", "caching", "sampling")
"""States whose progress is counted in `phase_done` and `phase_total`."""
LOSSES_IN_MEAN = 20
MAX_WARNINGS = 5


def progress_view() -> ProgressView | EmptyView:
    """Returns state, figures, actions and queue of the run that is shown."""
    folder = runs.shown()
    if folder is None:
        return {}
    current = runs.status(folder)
    has_failed = current.state in ("failed", "interrupted")
    return {
        "run": folder.name,
        "name": labels.title(folder),
        "state": current.state,
        "label": labels.state_label(folder, current),
        "tone": labels.tone(current),
        "busy": current.is_active,
        "phase": _phase(current),
        "share": _share(current),
        "step": current.step,
        "total": current.total_steps,
        "left": _time_left(current),
        "speed": _speed(current),
        "loss": _mean_loss(current),
        **_measurements(current),
        "took": formatting.duration(current.finished.seconds) if current.finished else "",
        "message": current.message if has_failed else "",
        "gauge": gauge(folder, current),
        "ended_early": current.ended_early,
        "warnings": current.warnings[-MAX_WARNINGS:],
        "actions": sorted(run_actions.available(current)),
        "report": files.report_href(folder, current),
        "file": files.adapter_file(folder, current),
        "details": _details(current),
        "queue": _queue_after(folder),
    }


def _phase(current: RunStatus) -> str:
    """Returns the progress of the present phase, such as "120 of 400"."""
    if current.state not in PHASES or not current.phase_total:
        return ""
    unit = " MB" if current.state == "downloading" else ""
    return f"{current.phase_done:,} of {current.phase_total:,}{unit}"


def _share(current: RunStatus) -> float:
    """Returns how full the progress bar is, from 0 to 1.

    It shows the present phase before the first step, and the steps after it.
    """
    if current.started is not None and current.total_steps:
        return current.step / current.total_steps
    return current.phase_done / current.phase_total if current.phase_total else 0.0


def _time_left(current: RunStatus) -> str:
    if current.state not in ("training", "sampling") or not current.step:
        return ""
    return formatting.duration(current.seconds_left)


def _speed(current: RunStatus) -> str:
    seconds = current.seconds_per_step
    if not seconds:
        return ""
    return f"{1 / seconds:.1f} steps/s" if seconds < 1 else f"{seconds:.1f} s/step"


def _mean_loss(current: RunStatus) -> str:
    losses = [loss for _, loss in current.losses[-LOSSES_IN_MEAN:]]
    return f"{statistics.fmean(losses):.4f}" if losses else ""


def _measurements(current: RunStatus) -> Measurements:
    """Returns the last validation loss and, during a training, the figures of the device."""
    validation = f"{current.validation_losses[-1][1]:.4f}" if current.validation_losses else ""
    if not current.is_active:
        return {"validation": validation}
    usage, host = device.measured()
    has_cuda = device.has_cuda()
    ram = f"{host.used / 1e9:.0f} / {host.total / 1e9:.0f} GB"
    images = current.images_per_second
    rates = current.learning_rates
    return {
        "validation": validation,
        "images": f"{images:.1f}" if images else "",
        "rate": f"{rates[-1][1]:.2g}" if rates else "",
        "memory": f"{usage.used / 1e9:.1f} / {usage.total / 1e9:.0f} GB" if usage.total else "",
        "memory_of": f"GPU memory (RAM {ram})" if has_cuda else "memory",
        "use": f"{_rounded_percent(usage.busy)} % {'GPU' if has_cuda else 'CPU'}",
    }


def _rounded_percent(share: float) -> int:
    """Returns a multiple of 5: each change of a figure is sent to the browser."""
    return round(20 * share) * 5


def _details(current: RunStatus) -> str:
    """Returns the images and the device of a training that has begun."""
    started = current.started
    if started is None:
        return ""
    images = f"{started.pictures} images"
    if started.held_out:
        images += f" ({started.held_out} more for validation)"
    return " · ".join([images, started.device, started.precision, started.attention])


def _queue_after(shown: Path) -> list[QueuedRun]:
    return [
        {"run": folder.name, "name": labels.title(folder)}
        for folder in queue.waiting_runs()
        if folder != shown
    ]

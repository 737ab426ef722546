"""Run folders as plain data for the views that the browser draws. No markup, no Gradio."""

import json
import math
import statistics
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from app.jobs import device, runs
from app.settings import own_presets
from trainer.errors import TrainerError
from trainer.runs import cache_limits, convergence, error_messages, run_folder, run_requests
from trainer.runs.events import Probed, SampleSaved
from trainer.runs.run_status import RunStatus

LABELS = {
    "new": "Not started",
    "queued": "Waiting",
    "waiting": "Waiting for the device",
    "loading": "Loading the model",
    "downloading": "Downloading the model",
    "caching": "Reading the pictures",
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
PLOT_POINTS = 300


def duration(seconds: float | None) -> str:
    """ "14 s", "3 min", "2 h 10 min"."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def size(count: int | None) -> str:
    if count is None:
        return ""
    return (
        f"{count / 1e9:.1f} GB"
        if count >= 1e9
        else f"{count / 1e6:.1f} MB"
        if count >= 1e5
        else f"{count / 1e3:.0f} kB"
    )


def count(number: int) -> str:
    """ "12.8 M", "31 k"."""
    return (
        f"{number / 1e6:.1f} M"
        if number >= 1e5
        else f"{number / 1e3:.0f} k"
        if number >= 1000
        else str(number)
    )


def title(folder: Path) -> str:
    """The name the person gave, or the folder's where the settings cannot be read."""
    try:
        return runs.settings(folder).name
    except TrainerError:
        return folder.name


def label(folder: Path, current: RunStatus) -> str:
    if current.state == "queued" and runs.active() is None and run_requests.queue()[:1] == [folder]:
        return "Starting"
    return LABELS.get(current.state, current.state.capitalize())


def header(machine: str) -> dict:
    """The line above the tabs."""
    folder = runs.shown()
    idle = {"device": machine, "text": "Idle", "tone": "quiet"}
    if folder is None:
        return idle
    current = runs.status(folder)
    if not (current.is_active or current.state == "queued"):
        return idle | {"run": folder.name, "name": title(folder), "state": current.state}
    text = label(folder, current)
    if current.state == "training" and current.total_steps:
        text += f" {100 * current.step // current.total_steps} %"
        text += (
            f" · {duration(current.seconds_left)} left" if current.seconds_left is not None else ""
        )
    return {
        "device": machine,
        "text": text,
        "tone": TONES.get(current.state, "busy"),
        "busy": current.is_active,
        "run": folder.name,
    }


def progress() -> dict:
    """The status card of the Train tab."""
    folder = runs.shown()
    if folder is None:
        return {}
    current = runs.status(folder)
    return {
        "run": folder.name,
        "name": title(folder),
        "state": current.state,
        "label": label(folder, current),
        "tone": TONES.get(current.state, "busy"),
        "busy": current.is_active,
        "phase": _phase(current),
        "share": _share(current),
        "step": current.step,
        "total": current.total_steps,
        "left": duration(current.seconds_left)
        if current.state in ("training", "sampling") and current.step
        else "",
        "speed": _speed(current),
        "loss": f"{statistics.fmean(loss for _, loss in current.losses[-20:]):.4f}"
        if current.losses
        else "",
        **_present(current),
        "took": duration(current.finished.seconds) if current.finished else "",
        "message": current.message if current.state in ("failed", "interrupted") else "",
        "gauge": gauge(folder, current),
        "ended_early": current.ended_early,
        "warnings": current.warnings[-5:],
        "actions": sorted(runs.actions(current)),
        "report": report_href(folder, current),
        "file": final_file(folder, current),
        "details": _details(current),
        "queue": [
            {"run": other.name, "name": title(other)} for other in runs.waiting() if other != folder
        ],
    }


def gauge(folder: Path, current: RunStatus) -> dict | None:
    """Where a run stands between learning and memorising, in a sentence, and what to change; None where nothing says so."""
    reading = current.assessment
    if reading is None:
        return None
    whole = (current.seconds_per_step or 0.0) * current.total_steps
    try:
        changes = convergence.suggest_changes(runs.settings(folder), reading, whole)
    except TrainerError:
        changes = []
    return {
        "zone": reading.zone,
        "needle": round(reading.gauge, 3),
        "sentence": reading.sentence,
        "changes": changes,
    }


def _present(current: RunStatus) -> dict:
    """What is measured while it runs; the last validation loss stays."""
    now = {"validation": f"{current.validation_losses[-1][1]:.4f}" if current.validation_losses else ""}
    if not current.is_active:
        return now
    here, host = device.measured()
    images = current.images_per_second
    gpu = device.has_cuda()
    return now | {
        "images": f"{images:.1f}" if images else "",
        "rate": f"{current.learning_rates[-1][1]:.2g}" if current.learning_rates else "",
        "memory": f"{here.used / 1e9:.1f} / {here.total / 1e9:.0f} GB" if here.total else "",
        "memory_of": f"GPU memory (RAM {host.used / 1e9:.0f} / {host.total / 1e9:.0f} GB)"
        if gpu
        else "memory",
        "use": f"{round(20 * here.busy) * 5} % {'GPU' if gpu else 'CPU'}",
    }


def _phase(current: RunStatus) -> str:
    if current.state in ("loading", "downloading", "caching", "sampling") and current.phase_total:
        return f"{current.phase_done:,} of {current.phase_total:,}{' MB' if current.state == 'downloading' else ''}"
    return ""


def _share(current: RunStatus) -> float:
    """How full the bar is, 0 to 1: of the phase before the first step, of the steps after it."""
    if current.started is None or not current.total_steps:
        return current.phase_done / current.phase_total if current.phase_total else 0.0
    return current.step / current.total_steps


def _speed(current: RunStatus) -> str:
    seconds = current.seconds_per_step
    if not seconds:
        return ""
    return f"{1 / seconds:.1f} steps/s" if seconds < 1 else f"{seconds:.1f} s/step"


def _details(current: RunStatus) -> str:
    if current.started is None:
        return ""
    begun = current.started
    held = f" ({begun.held_out} held out for measuring)" if begun.held_out else ""
    return (
        f"{begun.pictures} pictures{held} · {begun.device} · {begun.precision} · {begun.attention}"
    )


def curve() -> dict:
    """Loss and validation loss, thinned so that a long run costs the browser no more than a short one."""
    folder = runs.shown()
    current = runs.status(folder) if folder else None
    if current is None or not current.losses:
        return {}
    return {
        "total": current.total_steps,
        "loss": thin(current.losses),
        "smooth": thin(smooth(current.losses)),
        "validation": current.validation_losses,
        "training": [
            (point.step, point.training_loss)
            for point in current.validations
            if point.training_loss is not None and math.isfinite(point.training_loss)
        ],
        "rates": thin(current.learning_rates, 100),
        "saves": sorted({saved.step for saved in current.adapters}),
        "best": current.best_step,
    }


def thin(points: list[tuple[int, float]], limit: int = PLOT_POINTS // 2) -> list[tuple[int, float]]:
    """At most `limit` points: means of neighbours."""
    width = max(1, -(-len(points) // limit))
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return [
        (group[-1][0], float(f"{statistics.fmean(loss for _, loss in group):.4g}"))
        for group in groups
    ]


def smooth(points: list[tuple[int, float]], length: int = 0) -> list[tuple[int, float]]:
    """Exponential mean over about a twentieth of the run, or of `length` steps, without the usual pull towards the first value."""
    keep = 1 - 1 / max(2.0, (length or len(points)) / 20)
    total, weight, result = 0.0, 0.0, []
    for step, loss in points:
        total, weight = keep * total + loss, keep * weight + 1
        result.append((step, total / weight))
    return result


def learned() -> dict:
    """Where the shown run's adapter changes the base, and how much of its rank it uses."""
    folder = runs.shown()
    if folder is None or not (current := runs.status(folder)).adapters or current.is_active:
        return {}
    path = folder / "learned.json"
    try:
        return _learned(path, path.stat().st_mtime_ns)
    except (OSError, ValueError):  # of an older version
        return {}


@lru_cache(maxsize=32)
def _learned(path: Path, modified: int) -> dict:
    """Read once: every open window asks each second, and that of a large adapter has thousands of numbers."""
    facts = json.loads(path.read_text(encoding="utf-8"))
    by_use = sorted(
        (module for module in facts["modules"] if "enough" in module),
        key=lambda module: -module["enough"]["99"],
    )
    return {
        "run": path.parent.name,
        "blocks": facts["blocks"],
        "rank": facts.get("rank", 0),
        "spectrum": facts.get("spectrum", []),
        "enough": facts.get("enough", {}),
        "modules": [
            [module["name"], len(module["values"]), module["enough"]["95"], module["enough"]["99"]]
            for module in by_use
        ],
    }


def samples() -> dict:
    """The samples of the shown run: a row per prompt, the base first."""
    folder = runs.shown()
    if folder is None:
        return {}
    current = runs.status(folder)
    rows: dict[tuple[str, int], list[SampleSaved]] = {}
    for sample in current.samples:
        rows.setdefault((sample.prompt, sample.seed), []).append(sample)
    probes = [probe for probe in current.probes if probe.file]
    return {
        "best": current.best_step,
        "active": current.is_active,
        "without": {
            "prompt": probes[0].prompt,
            "seed": probes[0].seed,
            "pictures": [_sample(folder, probe) | {"leak": probe.leak} for probe in probes],
        }
        if probes
        else None,
        "likeness": [
            (probe.step, round(probe.likeness, 3))
            for probe in current.probes
            if probe.likeness is not None
        ],
        "between": next(
            (
                round(probe.likeness_between, 3)
                for probe in current.probes
                if probe.likeness_between is not None
            ),
            None,
        ),
        "rows": [
            {
                "prompt": prompt,
                "seed": seed,
                "pictures": [_sample(folder, sample) for sample in row],
            }
            for (prompt, seed), row in rows.items()
        ],
    }


def _sample(folder: Path, sample: SampleSaved | Probed) -> dict:
    return {"step": sample.step, "src": f"/runfile/{folder.name}/{sample.file}"}


def report_href(folder: Path, current: RunStatus) -> str:
    """Where the report of a failure is fetched; "" without one."""
    return (
        f"/runfile/{folder.name}/{error_messages.REPORT_FILE}"
        if current.state in ("failed", "interrupted") and (folder / error_messages.REPORT_FILE).is_file()
        else ""
    )


def final_file(folder: Path, current: RunStatus) -> dict | None:
    """The adapter to download."""
    name = current.adapter
    if not name or not (folder / name).is_file():
        return None
    embedding = run_folder.embedding_path(folder / name)
    return {
        "href": f"/runfile/{folder.name}/{name}",
        "name": name,
        "size": size((folder / name).stat().st_size),
        "embedding": {"href": f"/runfile/{folder.name}/{embedding.name}", "name": embedding.name}
        if embedding.is_file()
        else None,
    }


def library() -> dict:
    """All runs as cards, newest first."""
    return {"cards": [_library_card(folder) for folder in runs.all_runs()], "cache": cache_size()}


def samples_of_file(current: RunStatus) -> list[SampleSaved]:
    """Up to four pictures of the save that is handed out; of the last one where it was not sampled."""
    step = current.file_step or current.step
    return [sample for sample in current.samples if sample.step == step][:4] or current.samples[-1:]


cache_size = runs.ttl_cached(lambda: size(cache_limits.size()), seconds=60)


def _library_card(folder: Path) -> dict:
    current = runs.glance(folder)
    shown = samples_of_file(current)
    try:
        run = runs.settings(folder)
        recipe = own_presets.every().get(run.preset)
        settings, fault = (folder / "run.toml").read_text(encoding="utf-8"), ""
    except TrainerError as error:
        run, recipe, settings, fault = None, None, "", str(error)
    made = datetime.fromtimestamp((folder / "run.toml").stat().st_mtime)
    return {
        "run": folder.name,
        "name": title(folder),
        "label": label(folder, current),
        "tone": TONES.get(current.state, "busy"),
        "preset": recipe.title if recipe else "Own settings",
        "steps": f"{current.step} steps" if not current.is_active else "",
        "best": current.best_step if len(current.adapters) > 1 else None,
        "date": f"{made.day} {made:%B %Y, %H:%M}",
        "sample": _sample(folder, shown[0])["src"] if shown else "",
        "prompt": shown[0].prompt if shown else "",
        "file": final_file(folder, current),
        "actions": sorted(runs.actions(current)),
        "settings": settings,
        "fault": fault or current.message,
        "report": report_href(folder, current),
        "folder": str(folder),
        "can_preview": bool(current.adapters),
        "trigger": run.dataset.trigger if run else "",
        "gauge": gauge(folder, current),
        "base": run.base.model if run else "",
    }

"""Captions written by a model, in a separate process: started, followed and stopped by its folder.

The process works as a training does: events in events.jsonl, a lock while it lives, and requests.
"""

import subprocess
from pathlib import Path

from app.actions import datasets
from app.actions.records import BrowserData, CaptioningStatus, DownloadSize
from app.jobs import device, runs, trainer_process
from trainer.curation import autocaption
from trainer.errors import DatasetError
from trainer.runs import events, run_folder, run_lock, run_requests

MAX_RESULTS = 5
"""How many of the last captions and warnings are shown."""
MAX_REASON_LENGTH = 300
TEXT_OPTIONS = ("model", "tagger", "prefix", "blacklist")
SHARE_OPTIONS = ("threshold", "character_threshold")

_processes: dict[Path, "subprocess.Popen[bytes]"] = {}
"""The last job of each dataset folder. A process writes its first event after some seconds."""


def start(data: BrowserData) -> CaptioningStatus:
    """Starts `python -m trainer caption` for a dataset.

    Raises DatasetError if an option is wrong, if captions are being written already, or if a
    training uses the GPU.
    """
    folder = datasets.resolve(data.get("dataset"))
    job_folder = autocaption.job_folder(folder)
    if run_lock.is_alive(job_folder):
        raise DatasetError("Captions are being written for this dataset already.")
    if device.has_cuda() and runs.anyone_trains():
        raise DatasetError("A training uses the GPU now; wait until it ends.")
    arguments = ["caption", str(folder), *_options(data)]
    job_folder.mkdir(exist_ok=True)
    (job_folder / "events.jsonl").unlink(missing_ok=True)
    with open(job_folder / "log.txt", "wb") as log:
        _processes[folder] = trainer_process.start(
            arguments,
            job_folder,
            run_folder.outputs_folder(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    return status(data)


def _options(data: BrowserData) -> list[str]:
    """Returns the options of the command. Raises DatasetError for a wrong threshold."""
    options = []
    for name in TEXT_OPTIONS:
        text = str(data.get(name) or "").strip()
        if text:
            options.append(f"--{name}={text}")
    for name in SHARE_OPTIONS:
        if data.get(name) not in (None, ""):
            options.append(f"--{name.replace('_', '-')}={_share(data[name])}")
    if data.get("overwrite"):
        options.append("--overwrite")
    return options


def _share(value: object) -> float:
    try:
        share = float(str(value))
    except ValueError:
        share = -1
    if not 0 <= share <= 1:
        raise DatasetError("A threshold is a number from 0 to 1.")
    return share


def stop(data: BrowserData) -> CaptioningStatus:
    """Requests that the job ends after the present image."""
    job_folder = autocaption.job_folder(datasets.resolve(data.get("dataset")))
    if run_lock.is_alive(job_folder):
        run_requests.request(job_folder, "stop")
    return status(data)


def status(data: BrowserData) -> CaptioningStatus:
    """Returns how far the job of a dataset is: none, running, done or failed."""
    folder = datasets.resolve(data.get("dataset"))
    job_folder = folder / ".atelier" / "captioning"
    written = list(events.read_events(job_folder / "events.jsonl"))
    process = _processes.get(folder)
    is_starting = process is not None and process.poll() is None
    is_alive = is_starting or (job_folder.is_dir() and run_lock.is_alive(job_folder))
    result: CaptioningStatus = {
        "state": "none",
        "done": 0,
        "total": 0,
        "latest": [],
        "warnings": [],
        "message": "",
    }
    if not written and not is_alive and process is None:
        return result
    result["state"] = "running" if is_alive else "failed"
    for event in written:
        _apply(result, event)
    result["latest"] = result["latest"][-MAX_RESULTS:]
    result["warnings"] = result["warnings"][-MAX_RESULTS:]
    if result["state"] == "failed" and not result["message"]:
        result["message"] = _last_log_line(job_folder) or "The job ended without a message."
    return result


def _apply(result: CaptioningStatus, event: events.Event) -> None:
    match event:
        case events.Captioned():
            result["latest"].append({"file": event.file, "caption": event.caption})
        case events.Warned():
            result["warnings"].append(event.message)
        case events.Progress():
            result["done"] = event.done
            result["total"] = event.total
            result["loading"] = event.phase == "loading"
        case events.Failed():
            result["state"] = "failed"
            result["message"] = event.message
        case events.CaptionsDone():
            result["state"] = "done"
            result["done"] = result["total"]
            result["message"] = _summary(event)


def _summary(event: events.CaptionsDone) -> str:
    """Returns a sentence such as "Done: 12 captions written, 3 kept as they were."."""
    end = "Stopped" if event.stopped else "Done"
    captions = "1 caption" if event.written == 1 else f"{event.written} captions"
    kept = f", {event.kept} kept as they were" if event.kept else ""
    return f"{end}: {captions} written{kept}."


def _last_log_line(job_folder: Path) -> str:
    try:
        log = (job_folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    lines = log.strip().splitlines()
    return lines[-1][:MAX_REASON_LENGTH] if lines else ""


def download_size(data: BrowserData) -> DownloadSize:
    """Returns how much must be downloaded for the chosen models."""
    size = 0
    for option in ("model", "tagger"):
        name = str(data.get(option) or "").strip()
        if name:
            size += autocaption.download_bytes(name)
    if not size:
        return {"bytes": 0, "text": "Nothing has to be downloaded."}
    return {"bytes": size, "text": f"{size / 1e6:.0f} MB are downloaded first."}

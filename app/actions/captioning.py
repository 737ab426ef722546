"""Captions by models as a job of its own process: started, followed and stopped through its folder, as a training is."""

import subprocess
from pathlib import Path

from app.actions import datasets
from app.jobs import device, runs
from trainer.curation import autocaption
from trainer.errors import DatasetError
from trainer.runs import run_folder, run_lock, run_requests
from trainer.runs.events import Captioned, CaptionsDone, Failed, Progress, Warned, read_events

LATEST = 5  # results that are shown


def start(data: dict) -> dict:
    """Starts `python -m trainer caption` for a dataset. Raises DatasetError where that cannot be now."""
    folder = datasets.resolve(data.get("dataset"))
    place = autocaption.job_folder(folder)
    if run_lock.is_alive(place):
        raise DatasetError("Captions are being written for this dataset already.")
    if device.has_cuda() and runs.anyone_trains():
        raise DatasetError("A training has the GPU now; let it end first.")
    arguments = ["caption", str(folder)]
    for option in ("model", "tagger", "prefix", "blacklist"):
        arguments += [f"--{option}={text}"] if (text := str(data.get(option) or "").strip()) else []
    for option in ("threshold", "character_threshold"):
        arguments += (
            [f"--{option.replace('_', '-')}={_share(data[option])}"]
            if data.get(option) not in (None, "")
            else []
        )
    arguments += ["--overwrite"] if data.get("overwrite") else []
    place.mkdir(exist_ok=True)
    (place / "events.jsonl").unlink(missing_ok=True)
    with open(place / "log.txt", "wb") as log:
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        _processes[folder] = runs.trainer_process(
            arguments, place, run_folder.outputs_folder(), **streams
        )
    return status(data)


_processes: dict[Path, subprocess.Popen] = {}


def _share(value: object) -> float:
    try:
        share = float(str(value))
    except ValueError:
        share = -1
    if not 0 <= share <= 1:
        raise DatasetError("A threshold is a number from 0 to 1.")
    return share


def stop(data: dict) -> dict:
    """Asks the job to end after the picture at hand."""
    place = autocaption.job_folder(datasets.resolve(data.get("dataset")))
    if run_lock.is_alive(place):
        run_requests.request(place, "stop")
    return status(data)


def status(data: dict) -> dict:
    """What the job does or did: state "none", "starting", "running", "done" or "failed"."""
    folder = datasets.resolve(data.get("dataset"))
    place = folder / ".atelier" / "captioning"
    events = list(read_events(place / "events.jsonl"))
    process = _processes.get(folder)
    is_starting = process is not None and process.poll() is None
    alive = is_starting or (place.is_dir() and run_lock.is_alive(place))
    result = {"state": "none", "done": 0, "total": 0, "latest": [], "warnings": [], "message": ""}
    if not events and not alive and process is None:
        return result
    result["state"] = "running" if alive else "failed"
    written = [event for event in events if isinstance(event, Captioned)]
    result["latest"] = [
        {"file": event.file, "caption": event.caption} for event in written[-LATEST:]
    ]
    result["warnings"] = [event.message for event in events if isinstance(event, Warned)][-LATEST:]
    for event in events:
        match event:
            case Progress():
                result |= {
                    "done": event.done,
                    "total": event.total,
                    "loading": event.phase == "loading",
                }
            case Failed():
                result |= {"state": "failed", "message": event.message}
            case CaptionsDone():
                word = "Stopped" if event.stopped else "Done"
                kept = f", {event.kept} kept theirs" if event.kept else ""
                captions = "1 caption" if event.written == 1 else f"{event.written} captions"
                result |= {
                    "state": "done",
                    "done": result["total"],
                    "message": f"{word}: {captions} written{kept}.",
                }
    if result["state"] == "failed" and not result["message"]:
        result["message"] = _last_words(place) or "The job ended without a word."
    return result


def _last_words(place: Path) -> str:
    try:
        lines = (
            (place / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        )
    except OSError:
        return ""
    return lines[-1][:300] if lines else ""


def download_size(data: dict) -> dict:
    """What would have to be downloaded for the chosen models, in words."""
    wanted = [
        name for option in ("model", "tagger") if (name := str(data.get(option) or "").strip())
    ]
    size = sum(autocaption.download_bytes(name) for name in wanted)
    return {
        "bytes": size,
        "text": f"{size / 1e6:.0f} MB are downloaded first."
        if size
        else "Nothing has to be downloaded.",
    }

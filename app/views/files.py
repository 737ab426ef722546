"""The files of a run that can be downloaded or shown."""

from pathlib import Path

from app.views import formatting
from app.views.records import AdapterFile, FileLink
from trainer.runs import error_messages, run_folder
from trainer.runs.events import SampleSaved
from trainer.runs.run_status import RunStatus

MAX_SAMPLES = 4


def href(folder: Path, name: str) -> str:
    """Returns the URL of a file of a run, relative to the page."""
    return f"/runfile/{folder.name}/{name}"


def adapter_file(folder: Path, current: RunStatus) -> AdapterFile | None:
    """Returns the adapter to download, or None if the run has none."""
    name = current.adapter
    if not name or not (folder / name).is_file():
        return None
    return {
        "href": href(folder, name),
        "name": name,
        "size": formatting.file_size((folder / name).stat().st_size),
        "embedding": _embedding(folder, name),
    }


def _embedding(folder: Path, adapter: str) -> FileLink | None:
    file = run_folder.embedding_path(folder / adapter)
    if not file.is_file():
        return None
    return {"href": href(folder, file.name), "name": file.name}


def report_href(folder: Path, current: RunStatus) -> str:
    """Returns the URL of the report of a failure, "" if there is none."""
    has_failed = current.state in ("failed", "interrupted")
    if has_failed and (folder / error_messages.REPORT_FILE).is_file():
        return href(folder, error_messages.REPORT_FILE)
    return ""


def samples_of_adapter(current: RunStatus) -> list[SampleSaved]:
    """Returns up to four samples of the adapter to download.

    If no samples were made at its step, returns the last sample of the run.
    """
    step = current.file_step or current.step
    samples = [sample for sample in current.samples if sample.step == step]
    return samples[:MAX_SAMPLES] or current.samples[-1:]

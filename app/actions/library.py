"""What a person can do with the runs of the Library: rename, tag, delete, restore and compare."""

import itertools
import json
import os
import shutil
import time
from pathlib import Path

from app.actions.records import Comparison, ComparisonSide
from app.jobs import run_actions, runs
from app.settings import form
from app.views import charts, files, labels, run_notes
from trainer.errors import StateError
from trainer.runs import run_folder
from trainer.runs.atomic_files import atomic_write
from trainer.runs.events import SampleSaved
from trainer.runs.run_status import RunStatus

DELETED_RUNS_KEPT_FOR = 7 * 24 * 3600  # seconds
MAX_TAGS = 12
MAX_TAG_LENGTH = 30
MAX_NAME_LENGTH = 80


def describe(run_id: object, name: object, tags: object) -> None:
    """Sets the name and the tags of a run.

    Its files keep their names, because other programs refer to them.
    """
    folder = runs.resolve(run_id)
    new_name = " ".join(str(name or "").split())[:MAX_NAME_LENGTH]
    new_tags = []
    for tag in tags if isinstance(tags, list) else []:
        text = " ".join(str(tag).split())[:MAX_TAG_LENGTH]
        if text and text not in new_tags:
            new_tags.append(text)
    notes: run_notes.Notes = {
        "name": "" if new_name == labels.title(folder) else new_name,
        "tags": new_tags[:MAX_TAGS],
    }
    atomic_write(folder / run_notes.FILE, json.dumps(notes, ensure_ascii=False))


def removed_folder() -> Path:
    """Returns the folder of deleted runs."""
    return run_folder.outputs_folder() / "removed"


def delete(run_id: object) -> None:
    """Moves a run to the folder of deleted runs, where it stays for a week.

    Raises StateError if the run is active or waits in the queue.
    """
    folder = runs.resolve(run_id)
    if "delete" not in run_actions.available(runs.status(folder)):
        raise StateError("A run that is active or waits cannot be deleted; stop it first.")
    removed_folder().mkdir(parents=True, exist_ok=True)
    _delete_old_runs()
    target = removed_folder() / folder.name
    if target.exists():  # another run with this name was deleted before
        os.replace(target, target.with_name(f"{folder.name}-{time.time_ns()}"))
    shutil.move(folder, target)
    target.touch()


def _delete_old_runs() -> None:
    for folder in removed_folder().iterdir():
        if time.time() - folder.stat().st_mtime > DELETED_RUNS_KEPT_FOR:
            shutil.rmtree(folder)


def restore(run_id: object) -> None:
    """Restores a deleted run.

    Raises StateError if the run is gone, or if another run has its name.
    """
    folder = removed_folder() / str(run_id)
    if (
        not isinstance(run_id, str)
        or Path(run_id).name != run_id
        or not (folder / "run.toml").is_file()
        or folder.is_symlink()
    ):
        raise StateError("That run cannot be restored any more.")
    if (run_folder.runs_folder() / run_id).exists():
        raise StateError("There is a run with that name again; rename its folder first.")
    shutil.move(folder, run_folder.runs_folder() / run_id)


def compare(first: object, second: object) -> Comparison:
    """Returns the settings that differ between two runs, their curves and a sample of each.

    The samples have the same prompt if both runs have one for it.
    """
    folders = [runs.resolve(first), runs.resolve(second)]
    statuses = [runs.status(folder) for folder in folders]
    samples = _comparable_samples(*statuses)
    # Both curves are smoothed over the same number of steps: the same losses then look the same.
    length = max(len(current.losses) for current in statuses)
    settings, other_settings = (runs.settings(folder) for folder in folders)
    paths = [path for path in form.all_fields() if path != "name"]
    return {
        "settings": form.differences(other_settings, settings, paths),
        "runs": [
            _side(folder, current, sample, length)
            for folder, current, sample in zip(folders, statuses, samples, strict=True)
        ],
    }


def _comparable_samples(one: RunStatus, other: RunStatus) -> list[SampleSaved | None]:
    """Returns a sample of each run, with the same prompt if there is one."""
    samples = files.samples_of_adapter(one)
    other_samples = files.samples_of_adapter(other)
    for sample, other_sample in itertools.product(samples, other_samples):
        if sample.prompt == other_sample.prompt:
            return [sample, other_sample]
    return [next(iter(samples), None), next(iter(other_samples), None)]


def _side(
    folder: Path, current: RunStatus, sample: SampleSaved | None, length: int
) -> ComparisonSide:
    return {
        "name": run_notes.name_of(folder),
        "steps": current.step,
        "loss": charts.thin(charts.smooth(current.losses, length)),
        "validation": current.validation_losses,
        "sample": files.href(folder, sample.file) if sample else "",
        "prompt": sample.prompt if sample else "",
    }

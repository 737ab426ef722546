"""What a person can do with a run: start, pause, stop, resume, repeat, delete."""

import shutil
from collections.abc import Callable
from pathlib import Path

from app.jobs import queue, runs
from trainer import config
from trainer.config import RunConfig
from trainer.errors import StateError, TrainerError
from trainer.runs import run_folder, run_requests
from trainer.runs.atomic_files import atomic_write, check_room
from trainer.runs.run_status import RunStatus
from trainer.training import estimate

Action = Callable[[Path], None]


def start(run: RunConfig) -> str:
    """Adds a new run to the queue and returns its id. Raises DiskError if the disk is too full."""
    check_room(run_folder.runs_folder(), estimate.disk_bytes(run), "the run")
    folder = run_folder.create(run)
    run_requests.request(folder, "queued")
    return folder.name


def act(run_id: object, action: object) -> None:
    """Runs an action of `available` by its name.

    Raises StateError if the run does not exist, or if its state does not allow the action.
    """
    folder = runs.resolve(run_id)
    allowed = available(runs.status(folder))
    if action not in allowed:
        raise StateError(
            "That is not possible in the run's present state; the page has been brought up to date."
        )
    allowed[str(action)](folder)


def available(current: RunStatus) -> dict[str, Action]:
    """Returns the actions that are possible in the state of a run, by name."""
    if current.state == "queued":
        return {"unqueue": queue.withdraw, "earlier": queue.move_up}
    if current.state == "paused":
        return {"continue": continue_run, "stop": stop}
    if current.state == "stopping":
        return {}
    if current.is_active:
        if not current.step:
            return {"stop": stop, "pause": pause}
        return {"stop": stop, "pause": pause, "save": save, "sample": sample}
    if current.can_resume or current.state == "new":
        return {"resume": resume, "delete": delete, "repeat": repeat}
    return {"delete": delete, "repeat": repeat}


def pause(folder: Path) -> None:
    """Requests a pause after the present step."""
    run_requests.request(folder, "pause")


def continue_run(folder: Path) -> None:
    """Ends a pause."""
    run_requests.withdraw(folder, "pause")


def save(folder: Path) -> None:
    """Requests a save after the present step."""
    run_requests.request(folder, "save")


def sample(folder: Path) -> None:
    """Requests samples after the present step."""
    run_requests.request(folder, "sample")


def stop(folder: Path) -> None:
    """Requests that the run is saved and stopped, also if it is paused."""
    run_requests.request(folder, "stop")
    run_requests.withdraw(folder, "pause")


def resume(folder: Path) -> None:
    """Adds a run that ended, or never started, to the queue. Raises StateError without dataset."""
    dataset = Path(runs.settings(folder).dataset.folder)
    if not dataset.is_dir():
        raise StateError(
            f"The dataset {dataset} of this run is not there any more. "
            "Bring it back under that name, then press Resume."
        )
    run_requests.withdraw(folder, "stop")
    run_requests.withdraw(folder, "pause")
    run_requests.request(folder, "queued")


def repeat(folder: Path) -> None:
    """Adds a new run with the same settings to the queue."""
    start(runs.settings(folder))


def delete(folder: Path) -> None:
    """Deletes the folder of a run for good."""
    shutil.rmtree(folder)


def follow_dataset(old: Path, new: Path) -> None:
    """Writes the new folder of a renamed dataset into all runs, so they can be resumed or repeated.

    The folder's name affects no number of a training.
    """
    for folder in runs.all_runs():
        try:
            run = runs.settings(folder)
        except TrainerError:
            continue
        changes = {
            path: str(new)
            for path in ("dataset.folder", "dataset.regularisation_folder")
            if config.get(run, path) == str(old)
        }
        if changes:
            atomic_write(folder / "run.toml", config.to_toml(config.replace(run, changes)))

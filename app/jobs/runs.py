"""Reads runs from their folders: settings, status and log.

The trainer is a separate process, so it outlives the page. A page that starts later finds the run
by its folder. Nothing about a run is kept anywhere else.
"""

import os
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from app import accounts
from app.jobs.ttl_cache import ttl_cached
from trainer import config
from trainer.config import RunConfig
from trainer.errors import StateError
from trainer.runs import run_folder, run_lock, run_requests, run_status
from trainer.runs.run_status import RunStatus

LOG_LINES = 200
LOG_BYTES = 200_000
MOMENT = 0.3
"""Seconds that a list of runs may be old. One tick of the page reads it several times."""
MAX_STATUSES = 64
MAX_STATUSES_WITHOUT_CURVES = 20_000
MAX_SETTINGS = 2048

_probing = threading.RLock()
"""Probing takes the lock of a run briefly. Two probes at once would each see a living trainer."""


def resolve(run_id: object) -> Path:
    """Returns the folder of a run. Raises StateError if no run has this name."""
    folder = run_folder.runs_folder() / str(run_id)
    is_plain_name = (
        isinstance(run_id, str)
        and run_id == Path(run_id).name
        and run_id not in ("", ".", "..")
        and "\\" not in run_id
    )
    # os.path returns False for a NUL or a name that is too long. Path raises an error.
    if not is_plain_name or os.path.islink(folder) or not os.path.isfile(folder / "run.toml"):
        raise StateError("There is no such run; it may have been deleted.")
    return folder


# Settings


@dataclass(frozen=True)
class _Settings:
    run: RunConfig
    text: str
    """The content of run.toml."""


def settings(folder: Path) -> RunConfig:
    """Returns the settings of a run. Raises ConfigError if run.toml cannot be read."""
    return _settings(folder).run


def settings_text(folder: Path) -> str:
    """Returns the settings of a run as TOML. Raises ConfigError if run.toml cannot be read."""
    return _settings(folder).text


def _settings(folder: Path) -> _Settings:
    # Settings never change, but the name of a deleted run may be used for another run.
    file = (folder / "run.toml").stat()
    return _read_settings(folder, file.st_ino, file.st_mtime_ns)


@lru_cache(maxsize=MAX_SETTINGS)
def _read_settings(folder: Path, inode: int, modified: int) -> _Settings:
    file = folder / "run.toml"
    return _Settings(config.load(file), file.read_text(encoding="utf-8"))


# Status


def status(folder: Path) -> RunStatus:
    """Returns the status of a run. Reads only the events since the last call."""
    with _probing:
        return _replay(folder).status()


@lru_cache(maxsize=MAX_STATUSES)
def _replay(folder: Path) -> run_status.Replay:
    return run_status.Replay(folder)


def status_without_curves(folder: Path) -> RunStatus:
    """Returns the status of a run without its curves, for lists of runs: there may be thousands."""
    with _probing:
        return _short_replay(folder).status()


@lru_cache(maxsize=MAX_STATUSES_WITHOUT_CURVES)
def _short_replay(folder: Path) -> "_ShortReplay":
    return _ShortReplay(folder)


class _ShortReplay:
    """Replays the events of a run, but only if its folder has changed since the last call."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._replay = run_status.Replay(folder, curves=False)
        self._ended: tuple[tuple[int, int, int], RunStatus] | None = None
        """State of the events file and the status, if the run had ended."""

    def status(self) -> RunStatus:
        version = self._events_version()
        is_queued = run_requests.requested(self.folder, "queued")
        # The status of an ended run depends on its events alone. All others depend on the lock too.
        if self._ended and self._ended[0] == version and not is_queued:
            return self._ended[1]
        current = self._replay.status()
        has_ended = current.state in ("stopped", "failed", "finished")
        self._ended = (version, current) if version and has_ended else None
        return current

    def _events_version(self) -> tuple[int, int, int] | None:
        try:
            file = os.stat(self.folder / "events.jsonl")
        except OSError:
            return None
        return file.st_ino, file.st_size, file.st_mtime_ns


# Lists of runs


@ttl_cached(MOMENT, key=run_folder.runs_folder)
def all_runs() -> list[Path]:
    """Returns the folders of all runs of the person that is signed in, newest first."""
    return [folder for folder in run_folder.list_runs() if not folder.is_symlink()]


@ttl_cached(MOMENT, key=run_folder.runs_folder)
def active() -> Path | None:
    """Returns the run that is being trained, or None."""
    with _probing:
        for folder in run_folder.list_runs():
            if run_lock.is_alive(folder):
                return folder
    return None


def anyone_trains() -> bool:
    """Returns whether a run of any person is being trained."""
    with _probing:
        for parent in accounts.all_runs_folders():
            if any(run_lock.is_alive(folder) for folder in run_folder.unsorted_runs(parent)):
                return True
    return False


def shown() -> Path | None:
    """Returns the run that the Train tab shows: the active one, else the next one, else the last.

    None if there are no runs.
    """
    running = active()
    if running is not None:
        return running
    queued = run_requests.queue()
    return queued[0] if queued else latest()


@ttl_cached(MOMENT, key=run_folder.runs_folder)
def latest() -> Path | None:
    """Returns the run that was launched last, or None if there are no runs."""
    launches = [
        (status_without_curves(folder).launched_at, folder.name, folder) for folder in all_runs()
    ]
    return max(launches)[2] if launches else None


# Log


def read_log(folder: Path) -> str:
    """Returns the last lines of the trainer's output, "" if there are none."""
    log = folder / "log.txt"
    if not log.is_file():
        return ""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_BYTES))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return "\n".join(lines[-LOG_LINES:])

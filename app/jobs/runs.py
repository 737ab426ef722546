"""Runs as the page sees them: it starts trainer processes and reads run folders, and keeps nothing else.

The trainer is a process of its own session, so it outlives the page; a page that starts later finds the run
by its folder. A thread starts the oldest waiting run whenever the executor has room: this machine, or a cluster (`app/ray_jobs.py`).
"""

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import lru_cache, partial, update_wrapper
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from app import accounts
from trainer import config
from trainer.config import RunConfig
from trainer.errors import StateError, TrainerError
from trainer.runs import error_messages, events, run_folder, run_lock, run_requests, run_status
from trainer.runs.atomic_files import atomic_write, check_room
from trainer.runs.run_status import RunStatus
from trainer.training import estimate

T = TypeVar("T")
LOG_LINES = 200
TRAINER = "trainer"  # the module that is run

MOMENT = 0.3  # seconds; a tick of the page asks the same several times

# Probing a run's lock takes it for a moment, so two probes at once would each see a living trainer.
_probing = threading.RLock()


class ttl_cached(Generic[T]):
    """Remembers the answer of a function for a moment, for each person's runs."""

    def __init__(self, function: Callable[[], T], seconds: float = MOMENT):
        self.function, self.seconds = function, seconds
        self.known: dict[Path, tuple[float, T]] = {}
        update_wrapper(self, function)

    def __call__(self) -> T:
        place, now = run_folder.runs_folder(), time.monotonic()
        if place not in self.known or now - self.known[place][0] > self.seconds:
            self.known[place] = (now, self.function())
        return self.known[place][1]

    def forget(self) -> None:
        self.known.clear()


def resolve(run_id: object) -> Path:
    """The folder of a run by its name. Raises StateError for what is none."""
    folder = run_folder.runs_folder() / str(run_id)
    is_plain = (
        isinstance(run_id, str)
        and run_id == Path(run_id).name
        and run_id not in ("", ".", "..")
        and "\\" not in run_id
    )
    # os.path says no where Path raises: a NUL, a name that is too long.
    if not is_plain or os.path.islink(folder) or not os.path.isfile(folder / "run.toml"):
        raise StateError("There is no such run; it may have been deleted.")
    return folder


def start(run: RunConfig) -> str:
    """Puts a new run into the queue. Returns its id."""
    check_room(run_folder.runs_folder(), estimate.disk_bytes(run), "the run")
    folder = run_folder.create(run)
    run_requests.request(folder, "queued")
    return folder.name


def status(folder: Path) -> RunStatus:
    """The state of a run; only what its trainer wrote since the last look is read."""
    with _probing:
        return _replay(folder).status()


@lru_cache(maxsize=64)
def _replay(folder: Path) -> run_status.Replay:
    return run_status.Replay(folder)


def glance(folder: Path) -> RunStatus:
    """The state of a run without its curves, for who looks at all of them: there may be thousands."""
    with _probing:
        return _glances(folder).status()


@lru_cache(maxsize=20_000)
def _glances(folder: Path) -> run_status.Replay:
    return run_status.Replay(folder, curves=False)


def settings(folder: Path) -> RunConfig:
    """The settings of a run, which never change; a run that was deleted may have left its name to another."""
    file = (folder / "run.toml").stat()
    return _settings(folder, file.st_ino, file.st_mtime_ns)


@lru_cache(maxsize=2048)
def _settings(folder: Path, inode: int, modified: int) -> RunConfig:
    return config.load(folder / "run.toml")


@ttl_cached
def all_runs() -> list[Path]:
    return [folder for folder in run_folder.list_runs() if not folder.is_symlink()]


@ttl_cached
def active() -> Path | None:
    """The run that has the device now."""
    with _probing:
        return next(
            (folder for folder in run_folder.list_runs() if run_lock.is_alive(folder)), None
        )


def follow_dataset(old: Path, new: Path) -> None:
    """Runs whose dataset got another name find it there, to be resumed or repeated; which folder it is alters no number."""
    for folder in all_runs():
        try:
            run = settings(folder)
        except TrainerError:
            continue
        moved = {
            place: str(new)
            for place in ("dataset.folder", "dataset.regularisation_folder")
            if config.get(run, place) == str(old)
        }
        if moved:
            atomic_write(folder / "run.toml", config.to_toml(config.replace(run, moved)))


def anyone_trains() -> bool:
    """Whether a run of any person has the device."""
    with _probing:
        return any(
            run_lock.is_alive(folder)
            for place in accounts.all_runs_folders()
            for folder in run_folder.unsorted_runs(place)
        )


def waiting() -> list[Path]:
    return [folder for folder in run_requests.queue() if folder != active()]


def shown() -> Path | None:
    """The run that the Train tab shows: the one at work, else the next one, else the latest."""
    if (running := active()) is not None:
        return running
    if queue := run_requests.queue():
        return queue[0]
    return _latest()


@ttl_cached
def _latest() -> Path | None:
    trained = [(glance(folder).launched_at, folder.name, folder) for folder in all_runs()]
    return max(trained)[2] if trained else None


def act(run_id: object, action: object) -> None:
    """Does what a button of a run says. Raises StateError where that is not possible now."""
    folder = resolve(run_id)
    allowed = actions(status(folder))
    if action not in allowed:
        raise StateError(
            "That is not possible in the run's present state; the page has been brought up to date."
        )
    allowed[str(action)](folder)


def actions(current: RunStatus) -> dict[str, Callable[[Path], None]]:
    """What can be done with a run in this state."""
    if current.state == "queued":
        return {
            "unqueue": lambda folder: run_requests.withdraw(folder, "queued"),
            "earlier": _earlier,
        }
    if current.state == "paused":
        return {"continue": lambda folder: run_requests.withdraw(folder, "pause"), "stop": _stop}
    if current.state == "stopping":
        return {}
    if current.is_active:
        wishes = ("pause", "save", "sample") if current.step else ("pause",)
        asked: dict[str, Callable[[Path], None]] = {
            what: partial(run_requests.request, what=what) for what in wishes
        }
        return {"stop": _stop} | asked
    if current.can_resume or current.state == "new":
        return {"resume": _resume, "delete": _delete, "repeat": repeat}
    return {"delete": _delete, "repeat": repeat}


def _stop(folder: Path) -> None:
    run_requests.request(folder, "stop")
    run_requests.withdraw(folder, "pause")


def _resume(folder: Path) -> None:
    dataset = Path(settings(folder).dataset.folder)
    if not dataset.is_dir():
        raise StateError(
            f"Its dataset {dataset} is not there any more: bring it back under that name, then press Resume."
        )
    run_requests.withdraw(folder, "stop")
    run_requests.withdraw(folder, "pause")
    run_requests.request(folder, "queued")


def _earlier(folder: Path) -> None:
    """Changes places with the one before it in the queue."""
    queue = list(run_requests.queue())
    place = queue.index(folder)
    if place:
        mine, other = (waiting / "queued" for waiting in (folder, queue[place - 1]))
        mine_at, other_at = mine.read_text(), other.read_text()
        atomic_write(mine, other_at)
        atomic_write(other, mine_at)


def repeat(folder: Path) -> None:
    """The same settings once more, as a run of its own."""
    start(settings(folder))


def _delete(folder: Path) -> None:
    shutil.rmtree(folder)


def read_log(run_id: object) -> str:
    """The end of the trainer's output."""
    return _log_end(resolve(run_id))


def _log_end(folder: Path) -> str:
    log = folder / "log.txt"
    if not log.is_file():
        return ""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 200_000))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return "\n".join(lines[-LOG_LINES:])


def trainer_process(
    arguments: list[str], folder: Path, outputs: Path | None = None, **streams
) -> subprocess.Popen:
    """Starts `python -m trainer ...` in a session of its own, away from the page's signals, in `folder`.

    Its outputs folder is that of the person whose run `folder` is, unless given.
    """
    root = str(Path(__file__).resolve().parents[2])
    environment = {
        **os.environ,
        "PYTHONUTF8": "1",
        "ATELIER_OUTPUTS": str(outputs or folder.parents[1]),
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    windows = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
    detached: dict[str, Any] = (
        {"creationflags": windows} if windows else {"start_new_session": True}
    )
    # -P keeps the working directory, a data folder, out of the places that Python imports from.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", TRAINER, *arguments],
        cwd=folder,
        env=environment,
        **streams,
        **detached,
    )


class Executor(Protocol):
    """Where the runs of the queue are trained. All it shares with the page is the run folder, which it must be able to reach."""

    def has_room(self) -> bool:
        """Whether another run may be given to it now."""

    def start(self, folder: Path) -> None:
        """Has a run trained; it may wait there for a device. What its trainer says goes into log.txt."""

    def poll(self) -> list[tuple[Path, int]]:
        """The runs whose trainers ended since this was last asked, with their exit codes."""

    def stop(self, folder: Path) -> None:
        """Ends what was started for a run that is not to begin any more."""


class Local:
    """On this machine, one run after the other; those that others started here count too."""

    def __init__(self, before_start: Callable[[], None] = lambda: None):
        self.before_start = before_start
        self.process: subprocess.Popen | None = None
        self.folder: Path | None = None

    def has_room(self) -> bool:
        return self.process is None and not anyone_trains()

    def start(self, folder: Path) -> None:
        self.before_start()
        with open(folder / "log.txt", "ab") as log:
            self.process = trainer_process(
                ["resume", str(folder)],
                folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.folder = folder

    def poll(self) -> list[tuple[Path, int]]:
        if self.process is None or self.folder is None or self.process.poll() is None:
            return []
        ended = (self.folder, self.process.returncode)
        self.process = self.folder = None
        return [ended]

    def stop(self, folder: Path) -> None:
        if self.process is not None and folder == self.folder:
            self.process.terminate()


class Launcher(threading.Thread):
    """Gives the oldest waiting run to the executor whenever that has room."""

    def __init__(self, executor: Executor | None = None):
        super().__init__(name="launcher", daemon=True)
        self.executor = executor or Local()
        self.given: dict[Path, float] = {}
        """Runs in the executor's hands, and when their trainer had begun the last time before."""
        self._ended = threading.Event()

    def run(self) -> None:
        said = ""
        while not self._ended.wait(0.5):
            try:
                self.look()
                said = ""
            except (
                OSError,
                TrainerError,
            ) as error:  # a folder deleted under our eyes, a full disk: the next look may succeed
                if str(error) != said:
                    logging.getLogger(__name__).warning(
                        "The queue could not be looked at: %s", error
                    )
                said = str(error)

    def end(self) -> None:
        """Stops looking. Trainers go on."""
        self._ended.set()

    def look(self) -> None:
        for folder, code in self.executor.poll():
            if folder in self.given:  # else it was taken out of the queue, and may wait there again
                _bury(folder, code, has_begun=status(folder).launched_at != self.given.pop(folder))
        for folder in [folder for folder in self.given if self._is_withdrawn(folder)]:
            self.executor.stop(folder)
            del self.given[folder]
        queue = [
            folder
            for place in accounts.all_runs_folders()
            for folder in run_requests.queue(place)
            if folder not in self.given
        ]
        if queue and self.executor.has_room():
            self._launch(min(queue, key=lambda folder: (folder / "queued").read_text()))

    def _launch(self, folder: Path) -> None:
        launched_at = status(folder).launched_at
        self.executor.start(folder)
        self.given[folder] = launched_at

    def _is_withdrawn(self, folder: Path) -> bool:
        """Whether the person took it out of the queue before its trainer began (which does so itself, holding the run's lock)."""
        if run_requests.requested(folder, "queued"):
            return False
        current = status(folder)
        return not current.is_active and current.launched_at == self.given[folder]


def _bury(folder: Path, code: int, has_begun: bool) -> None:
    """A trainer that ended before it took its run must not be started again and again; one that died at work is explained."""
    if not folder.is_dir() or run_lock.is_alive(folder):
        return
    if run_requests.requested(folder, "queued") and has_begun:
        return  # and was asked for again since
    log = events.EventLog(folder / "events.jsonl")
    if run_requests.requested(folder, "queued"):
        run_requests.withdraw(folder, "queued")
        lines = _log_end(folder).strip().splitlines()
        reason = lines[-1] if lines else f"exit code {code}"
        log.append(
            events.Failed(
                error_messages.without_secrets(f"The trainer ended before it began: {reason}")
            )
        )
    elif run_status.read_status(folder).state == "interrupted":
        log.append(events.TrainerDied(code))
    else:
        return
    error_messages.write_report(folder, run_status.read_status(folder).message)

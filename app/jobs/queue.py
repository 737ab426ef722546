"""The queue: a thread that gives waiting runs to an executor, and the executor for this machine."""

import logging
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from app import accounts
from app.jobs import runs, trainer_process
from trainer.errors import TrainerError
from trainer.runs import error_messages, events, run_lock, run_requests, run_status
from trainer.runs.atomic_files import atomic_write

CHECK_EVERY = 0.5  # seconds


def waiting_runs() -> list[Path]:
    """Returns the queued runs of the person that is signed in, the oldest request first."""
    return [folder for folder in run_requests.queue() if folder != runs.active()]


def withdraw(folder: Path) -> None:
    """Takes a run out of the queue."""
    run_requests.withdraw(folder, "queued")


def move_up(folder: Path) -> None:
    """Swaps a run with the one before it in the queue."""
    queue = list(run_requests.queue())
    index = queue.index(folder)
    if not index:
        return
    request = folder / "queued"
    request_before = queue[index - 1] / "queued"
    # The order of the queue is the order of the times in these files.
    time, time_before = request.read_text(), request_before.read_text()
    atomic_write(request, time_before)
    atomic_write(request_before, time)


class Executor(Protocol):
    """Trains the runs of the queue. It must be able to reach the run folders, and nothing else."""

    def has_room(self) -> bool:
        """Returns whether another run can be started now."""

    def start(self, folder: Path) -> None:
        """Starts the training of a run, which may wait for a device. Its output goes to log.txt."""

    def poll(self) -> list[tuple[Path, int]]:
        """Returns the runs whose trainers ended since the last call, with their exit codes."""

    def stop(self, folder: Path) -> None:
        """Ends the trainer of a run that was withdrawn before its training began."""


class LocalExecutor:
    """Trains on this machine, one run at a time. Runs that others started here count too."""

    def __init__(self, before_start: Callable[[], None] = lambda: None):
        self.before_start = before_start
        self.process: subprocess.Popen[bytes] | None = None
        self.folder: Path | None = None

    def has_room(self) -> bool:
        return self.process is None and not runs.anyone_trains()

    def start(self, folder: Path) -> None:
        self.before_start()
        with open(folder / "log.txt", "ab") as log:
            self.process = trainer_process.start(
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
    """Gives the oldest waiting run to the executor whenever the executor has room."""

    def __init__(self, executor: Executor | None = None):
        super().__init__(name="launcher", daemon=True)
        self.executor = executor or LocalExecutor()
        self.started: dict[Path, float] = {}
        """Runs that the executor has, with the time of their launch before this one."""
        self._ended = threading.Event()

    def run(self) -> None:
        """Checks the queue until `end` is called."""
        last_message = ""
        while not self._ended.wait(CHECK_EVERY):
            try:
                self.check()
                last_message = ""
            except (OSError, TrainerError) as error:
                # A folder that was just deleted, or a full disk: the next check may succeed.
                if str(error) != last_message:
                    log = logging.getLogger(__name__)
                    log.warning("The queue could not be checked: %s", error)
                last_message = str(error)

    def end(self) -> None:
        """Stops checking the queue. Trainers continue."""
        self._ended.set()

    def check(self) -> None:
        """Handles trainers that ended and runs that were withdrawn, then starts the next run."""
        for folder, code in self.executor.poll():
            # A run that was withdrawn is not in `started`. It may be in the queue again.
            if folder in self.started:
                has_begun = runs.status(folder).launched_at != self.started.pop(folder)
                _record_end(folder, code, has_begun)
        for folder in [folder for folder in self.started if self._is_withdrawn(folder)]:
            self.executor.stop(folder)
            del self.started[folder]
        queue = self._queue_of_everyone()
        if queue and self.executor.has_room():
            self._launch(min(queue, key=lambda folder: (folder / "queued").read_text()))

    def _queue_of_everyone(self) -> list[Path]:
        queue: list[Path] = []
        for parent in accounts.all_runs_folders():
            queue += run_requests.queue(parent)
        return [folder for folder in queue if folder not in self.started]

    def _launch(self, folder: Path) -> None:
        launched_before = runs.status(folder).launched_at
        self.executor.start(folder)
        self.started[folder] = launched_before

    def _is_withdrawn(self, folder: Path) -> bool:
        """Returns whether the run was taken out of the queue before its trainer began.

        A trainer that begins takes the run out of the queue too, but holds the run's lock.
        """
        if run_requests.requested(folder, "queued"):
            return False
        current = runs.status(folder)
        return not current.is_active and current.launched_at == self.started[folder]


def _record_end(folder: Path, code: int, has_begun: bool) -> None:
    """Writes an event and a report for a trainer that ended without writing why.

    A trainer that ended before its training began leaves the queue, so it is not started again
    and again.
    """
    if not folder.is_dir() or run_lock.is_alive(folder):
        return
    is_queued = run_requests.requested(folder, "queued")
    if is_queued and has_begun:
        return  # it was resumed since
    log = events.EventLog(folder / "events.jsonl")
    if is_queued:
        run_requests.withdraw(folder, "queued")
        lines = runs.read_log(folder).strip().splitlines()
        reason = lines[-1] if lines else f"exit code {code}"
        message = f"The trainer ended before it began: {reason}"
        log.append(events.Failed(error_messages.without_secrets(message)))
    elif run_status.read_status(folder).state == "interrupted":
        log.append(events.TrainerDied(code))
    else:
        return
    error_messages.write_report(folder, run_status.read_status(folder).message)

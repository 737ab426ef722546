"""Runs in this process, for `python -m trainer train` and `from trainer import run`."""

import faulthandler
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from trainer import __version__, config
from trainer.config import RunConfig
from trainer.errors import ConfigError, StateError, TrainerError
from trainer.runs import (
    cache_limits,
    error_messages,
    run_folder,
    run_lock,
    run_requests,
    run_status,
)
from trainer.runs.console import TerminalLog
from trainer.runs.events import Event, EventLog, Failed, Launched, Progress, SilentLog, Stopped
from trainer.runs.run_status import RunStatus
from trainer.training import launch

if TYPE_CHECKING:  # importing it would load torch.distributed
    from trainer.training.distributed import World

STOPPED = 3
"""Exit code of a run that the user stopped."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Result:
    """The outcome of a run."""

    folder: Path
    """The run folder, with samples, settings and the adapter of every save
    (docs/architecture.md)."""
    adapter: Path | None
    """The file of the chosen save (`saving.main`), or None if the run was stopped before its first
    step."""
    status: RunStatus
    """Steps, losses, samples and saves. `state` is "finished", or "stopped" if the user ended the
    run."""


def run(what: RunConfig | Path, progress: Callable[[Event], None] | None = None) -> Result:
    """Trains a new run, or resumes the one in a folder, and waits for its end.

    `progress` receives each event of `trainer.runs.events`, instead of the lines and the bar in the
    terminal. If `training.devices` is more than one, the run has other processes, and only the
    terminal shows its progress. Ctrl-C, or interrupting the kernel of a notebook, saves and ends
    the run. Raises TrainerError with the message that the page would show; `report.txt` in the run
    folder contains the traceback.
    """
    if isinstance(what, RunConfig):
        if not what.dataset.folder:
            raise ConfigError("No dataset was given: set dataset.folder to a folder of images.")
        what = run_folder.create(with_whole_paths(what))
    folder = what.resolve()
    log: type[EventLog] = TerminalLog if progress is None else EventLog
    code = run_in(folder, log=log, progress=progress)
    status = run_status.read_status(folder)
    if code not in (0, STOPPED):
        raise TrainerError(
            status.message or f"The run in {folder} failed; its log contains the reason."
        )
    return Result(folder, folder / status.adapter if status.adapter else None, status)


def with_whole_paths(run: RunConfig) -> RunConfig:
    """Makes paths absolute, so that the run can be resumed from any working directory."""
    changes = {}
    for path in ("dataset.folder", "base.model", "base.vae", "adapter.start_from"):
        value = config.get(run, path)
        # base.model may also be the name of a model on the Hub.
        if value and Path(value).exists():
            changes[path] = str(Path(value).resolve())
    if run.dataset.regularisation_folder:  # may not exist yet
        folder = Path(run.dataset.regularisation_folder)
        changes["dataset.regularisation_folder"] = str(folder.resolve())
    return config.replace(run, changes)


def run_in(
    folder: Path,
    world: "World | None" = None,
    log: type[EventLog] = TerminalLog,
    progress: Callable[[Event], None] | None = None,
) -> int:
    """Starts or resumes the run of a folder in this process. Returns the exit code.

    The process holds the run's lock until the end. With several devices there is one process for
    each, and rank 0 has the lock, the log and the files. Raises StateError if the folder is not a
    run folder.
    """
    if not (folder / "run.toml").is_file():
        raise StateError(f"{folder} is not a run folder: it has no run.toml.")
    folder = folder.resolve()
    run = config.load(folder / "run.toml")
    if run.training.devices > 1 and not launch.is_one_of_several():
        return _run_on_several_devices(run, folder)
    if launch.rank() > 0:
        # Rank 0 gets the signal too, and stops all ranks at the same step.
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        return _train(run, folder, SilentLog(), world)
    return _run_as_main(run, folder, world, log, progress)


def _run_on_several_devices(run: RunConfig, folder: Path) -> int:
    run_lock.acquire(folder).release()  # raises if another trainer has the run
    # Before the processes load: a stop that arrives while they load must count.
    _withdraw_old_requests(folder)
    with _signals_stop(folder):
        code = launch.start_several(run.training.devices, folder)
    return _exit_code(folder, code)


def _run_as_main(
    run: RunConfig,
    folder: Path,
    world: "World | None",
    log: type[EventLog],
    progress: Callable[[Event], None] | None,
) -> int:
    lock, device = run_lock.acquire(folder), run_lock.device_lock()
    cache_limits.clean_half_written(folder)
    cache_limits.prune()
    events = log(folder / "events.jsonl")
    if progress:
        events.listeners.append(progress)
    if not launch.was_started_here():
        _withdraw_old_requests(folder)
    (folder / error_messages.REPORT_FILE).unlink(missing_ok=True)  # of an earlier failure
    events.append(Launched(os.getpid(), __version__, run_lock.boot_id()))
    # After the event: without it the page would believe that the user removed the run from the
    # queue.
    run_requests.withdraw(folder, "queued")
    try:
        with _signals_stop(folder):
            if not _wait_for(device, folder, events):
                events.append(Stopped(run_status.read_status(folder).step, ""))
                return STOPPED
            return _train(run, folder, events, world)
    finally:
        events.close()
        device.release()
        lock.release()


def _exit_code(folder: Path, code: int) -> int:
    return STOPPED if run_status.read_status(folder).state == "stopped" else code


def _withdraw_old_requests(folder: Path) -> None:
    """Withdraws requests from before the run was resumed."""
    for request in ("stop", "pause"):
        run_requests.withdraw(folder, request)


@contextmanager
def _signals_stop(folder: Path) -> Iterator[None]:
    """Makes Ctrl-C and SIGTERM request a stop, with a save, inside the block.

    Python runs signal handlers only in the main thread, so other threads change nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def request_stop(*_: object) -> None:
        run_requests.request(folder, "stop")

    before = {number: signal.signal(number, request_stop) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_for(device: FileLock, folder: Path, log: EventLog) -> bool:
    """Waits until no other run has the device. Returns False if the user stops the run first."""
    try:
        device.acquire(timeout=0)
        return True
    except Timeout:
        log.append(Progress("waiting"))
    while not run_requests.take(folder, "stop"):
        try:
            device.acquire(timeout=0.5)
            return True
        except Timeout:
            continue
    return False


def _train(run: RunConfig, folder: Path, log: EventLog, world: "World | None") -> int:
    """Trains and turns any error into a message. Returns the exit code."""
    # Imported here: the libraries take seconds, which wrong usage should not wait for.
    from trainer.models import libraries

    # A crash in native code leaves at least the line of Python in the log.
    faulthandler.enable(sys.__stderr__ or sys.stderr)
    libraries.configure_libraries()
    from trainer.runs import trackers
    from trainer.training import oom_fallbacks
    from trainer.training.distributed import join
    from trainer.training.loop import train

    is_main = launch.rank() == 0
    try:
        world = world or (join() if launch.is_one_of_several() else None)
        with trackers.tracked(run, folder, log) if is_main else nullcontext():
            chosen = train(run, folder, log, world)
    except Exception as error:  # the one place where any error becomes a message
        _report_failure(run, folder, log, error, is_main)
        return 1
    finally:
        # The next run of a sweep or a notebook needs the memory.
        oom_fallbacks.release_memory()
    if not is_main:
        return 0
    print(f"\n{chosen}")
    if launch.is_one_of_several():  # torch's launcher treats any other code as a failure
        return 0
    return _exit_code(folder, 0)


def _report_failure(
    run: RunConfig, folder: Path, log: EventLog, error: Exception, is_main: bool
) -> None:
    """Writes a failure to the log, the events and the report, as far as the disk permits.

    The traceback of an error that is not a TrainerError goes to the log too.
    """
    from trainer.models.device import is_out_of_memory
    from trainer.training import oom_fallbacks

    text = oom_fallbacks.advice(run) if is_out_of_memory(error) else error_messages.explain(error)
    message = error_messages.without_secrets(text)
    stack = error_messages.without_secrets("".join(traceback.format_exception(error)))
    if not is_main:
        print(f"\nProcess {launch.rank() + 1}: {stack}\n{message}", file=sys.stderr)
        return
    if not isinstance(error, TrainerError):
        print(stack, file=sys.stderr)
    print(f"\n{message}", file=sys.stderr)
    try:
        log.append(Failed(message))
        error_messages.write_report(folder, message, error)
        print(f"The full report is in {folder / error_messages.REPORT_FILE}", file=sys.stderr)
    except (OSError, TrainerError) as second:
        print(f"The report could not be written: {second}", file=sys.stderr)

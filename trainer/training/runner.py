"""Runs in this process: what `python -m trainer train` and `from trainer import run` have in common."""

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
from trainer.models.device import is_out_of_memory
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

if TYPE_CHECKING:  # it reads torch
    from trainer.training.distributed import World

STOPPED = 3  # the exit code of a run that was asked to end


@dataclass(frozen=True)
class Result:
    """What a run left."""

    folder: Path
    """Its run folder, with samples, settings and the adapter of every save (docs/architecture.md)."""
    adapter: Path | None
    """The file of the best save (`saving.main`); None where the run was stopped before its first step."""
    status: RunStatus
    """Steps, losses, samples and saves. `state` is "finished", or "stopped" where it was asked to end."""


def run(what: RunConfig | Path, progress: Callable[[Event], None] | None = None) -> Result:
    """Trains a new run, or goes on with the one in a folder, and waits for its end.

    `progress` is told of each event of trainer/events.py, in place of the lines and the bar in the terminal; where
    `training.devices` is more than one, the run has processes of its own and only the terminal is told. Ctrl-C, or interrupting the
    kernel of a notebook, saves and ends the run. Raises TrainerError with the sentence that the page would show; `report.txt` in the
    run folder has the traceback.
    """
    if isinstance(what, RunConfig):
        if not what.dataset.folder:
            raise ConfigError("Which pictures? Set dataset.folder.")
        what = run_folder.create(with_whole_paths(what))
    folder = what.resolve()
    log: type[EventLog] = TerminalLog if progress is None else EventLog
    code = run_in(folder, log=log, progress=progress)
    status = run_status.read_status(folder)
    if code not in (0, STOPPED):
        raise TrainerError(status.message or f"The run in {folder} failed; its log says why.")
    return Result(folder, folder / status.adapter if status.adapter else None, status)


def with_whole_paths(run: config.RunConfig) -> config.RunConfig:
    """A run must be found again from any working directory."""
    paths = {
        path: config.get(run, path)
        for path in ("dataset.folder", "base.model", "base.vae", "adapter.start_from")
    }
    changes = {
        path: str(Path(value).resolve())
        for path, value in paths.items()
        if value and Path(value).exists()
    }
    if run.dataset.regularisation_folder:  # need not be there yet
        changes["dataset.regularisation_folder"] = str(
            Path(run.dataset.regularisation_folder).resolve()
        )
    return config.replace(run, changes)


def run_in(
    folder: Path,
    world: "World | None" = None,
    log: type[EventLog] = TerminalLog,
    progress: Callable[[Event], None] | None = None,
) -> int:
    """Starts or continues the run of a folder in this process, which holds its lock until the end. Returns the exit code.

    Where several devices are asked for, in a process for each; the first one has the lock, the log and the files.
    """
    if not (folder / "run.toml").is_file():
        raise StateError(f"{folder} is no run folder: it has no run.toml.")
    folder = folder.resolve()
    run = config.load(folder / "run.toml")
    if run.training.devices > 1 and not launch.is_one_of_several():
        run_lock.acquire(folder).release()  # refused here already, where another trainer has it
        _put_aside(folder)  # not later: a stop that comes while the processes load is meant
        with _signals_stop(folder):
            code = launch.start_several(run.training.devices, folder)
        return STOPPED if run_status.read_status(folder).state == "stopped" else code
    if launch.rank() > 0:
        for name in (
            signal.SIGINT,
            signal.SIGTERM,
        ):  # the first process is told too, and stops all at the same step
            signal.signal(name, signal.SIG_IGN)
        return _train(run, folder, SilentLog(), world)
    lock, device = run_lock.acquire(folder), run_lock.device_lock()
    cache_limits.clean_half_written(folder)
    cache_limits.prune()
    events = log(folder / "events.jsonl")
    if progress:
        events.listeners.append(progress)
    if not launch.was_started_here():
        _put_aside(folder)
    (folder / error_messages.REPORT_FILE).unlink(missing_ok=True)  # of an earlier failure
    events.append(Launched(os.getpid(), __version__, run_lock.boot_id()))
    run_requests.withdraw(
        folder, "queued"
    )  # only now: before, the page would take it for withdrawn by the person
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


def _put_aside(folder: Path) -> None:
    """What was asked of an earlier life of the run."""
    for message in ("stop", "pause"):
        run_requests.withdraw(folder, message)


@contextmanager
def _signals_stop(folder: Path) -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM ask the run to save and end. Only the main thread of a process is told of signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        name: signal.signal(name, lambda *_: run_requests.request(folder, "stop"))
        for name in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _wait_for(device: FileLock, folder: Path, log: EventLog) -> bool:
    """Waits until no other run has the device; False where the person stops the run meanwhile."""
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


def _train(run: config.RunConfig, folder: Path, log: EventLog, world: "World | None") -> int:
    from trainer.models import libraries  # seconds, which wrong usage need not wait for

    faulthandler.enable(
        sys.__stderr__ or sys.stderr
    )  # a crash in native code leaves at least its place in the log
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
    except Exception as error:  # the one place where any error becomes a sentence
        sentence = error_messages.without_secrets(
            oom_fallbacks.advice(run) if is_out_of_memory(error) else error_messages.explain(error)
        )
        if is_main:
            _fail(folder, log, sentence, error)
        else:
            print(
                f"\nProcess {launch.rank() + 1}: {error_messages.without_secrets(traceback.format_exc())}\n{sentence}",
                file=sys.stderr,
            )
        return 1
    finally:
        oom_fallbacks.release()  # of the model, which the next run of a sweep or a notebook has no room beside
    if not is_main:
        return 0
    print(f"\n{chosen}")
    if launch.is_one_of_several():  # whose launcher takes any other code for a failure
        return 0
    return STOPPED if run_status.read_status(folder).state == "stopped" else 0


def _fail(folder: Path, log: EventLog, sentence: str, error: Exception) -> None:
    """Says it everywhere, as far as the disk lets it. The traceback of what nobody foresaw goes to the log as well."""
    if not isinstance(error, TrainerError):
        print(
            error_messages.without_secrets("".join(traceback.format_exception(error))),
            file=sys.stderr,
        )
    print(f"\n{sentence}", file=sys.stderr)
    try:
        log.append(Failed(sentence))
        error_messages.write_report(folder, sentence, error)
        print(f"The whole story is in {folder / error_messages.REPORT_FILE}", file=sys.stderr)
    except (OSError, TrainerError) as also:
        print(f"It could not be written down: {also}", file=sys.stderr)

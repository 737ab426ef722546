"""The status of a run, computed from its events and its lock alone."""

import math
import os
import signal
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import disk_usage
from typing import Any

from trainer.runs import convergence, events
from trainer.runs.run_lock import boot_id, is_alive
from trainer.runs.run_requests import requested

ACTIVE_STATES = (
    "waiting",
    "loading",
    "downloading",
    "caching",
    "sampling",
    "training",
    "paused",
    "stopping",
)
RESUMABLE_STATES = ("stopped", "failed", "interrupted")
SPEED_WINDOW = 50
"""The last steps whose median duration is the speed."""


@dataclass
class RunStatus:
    """The present state of a run, its curves and its files."""

    name: str
    state: str = "new"
    """One of ACTIVE_STATES or RESUMABLE_STATES, "new", "queued" or "finished"."""
    phase_done: int = 0
    phase_total: int = 0
    step: int = 0
    total_steps: int = 0
    started: events.Started | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)
    """(step, loss) pairs."""
    validations: list[events.Validated] = field(default_factory=list)
    learning_rates: list[tuple[int, float]] = field(default_factory=list)
    """(step, learning rate) pairs."""
    step_seconds: list[float] = field(default_factory=list)
    samples: list[events.SampleSaved] = field(default_factory=list)
    probes: list[events.Probed] = field(default_factory=list)
    adapters: list[events.AdapterSaved] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    message: str = ""
    """Why the run failed or was interrupted."""
    finished: events.Finished | None = None
    file: str = ""
    """The finished file of a run that has finished or was stopped, else ""."""
    file_step: int = 0
    """The step of the save that became the finished file."""
    launched_at: float = 0.0
    """Seconds since 1970, or 0 if the run was never started."""
    boot: str = ""
    """The `boot_id` of the machine when the run was last started."""
    exit_code: int | None = None
    """The exit code of a trainer that died without a last event."""
    seconds_between_steps: list[float] = field(default_factory=list)
    """How long each validation took, with its save and its samples."""
    last_step_at: float | None = None
    """When the last step ended, or None after a pause, which is not work."""
    is_between_steps: bool = False
    """Whether a validation has begun since the last step."""
    ended_early: str = ""
    """Why the run ended before its last step, or ""."""

    @property
    def validation_losses(self) -> list[tuple[int, float]]:
        """(step, loss) pairs of the validations, without losses that are not finite."""
        return [(point.step, point.loss) for point in self.validations if math.isfinite(point.loss)]

    @property
    def adapter(self) -> str:
        """The finished file, else the latest save, else ""."""
        if self.file:
            return self.file
        return self.adapters[-1].file if self.adapters else ""

    @property
    def is_active(self) -> bool:
        return self.state in ACTIVE_STATES

    @property
    def can_resume(self) -> bool:
        return self.state in RESUMABLE_STATES

    @property
    def seconds_per_step(self) -> float | None:
        """The median of the last steps, so that one slow step does not change it."""
        return statistics.median(self.step_seconds[-SPEED_WINDOW:]) if self.step_seconds else None

    @property
    def images_per_second(self) -> float | None:
        speed = self.seconds_per_step
        return self.started.images_per_step / speed if speed and self.started else None

    @property
    def seconds_left(self) -> float | None:
        """The time for the remaining steps and saves at the present speed."""
        speed = self.seconds_per_step
        if speed is None:
            return None
        saves = self.started.saves if self.started else 0
        # Counted up to the step before this one: a save in progress is not done yet.
        saves_done = max(0, self.step - 1) * saves // max(1, self.total_steps)
        seconds_per_save = 0.0
        if self.seconds_between_steps:
            seconds_per_save = statistics.median(self.seconds_between_steps)
        return speed * (self.total_steps - self.step) + seconds_per_save * (saves - saves_done)

    @property
    def best_step(self) -> int | None:
        """The step of `convergence.best_save`, or None without a validation set."""
        if not self.started or not self.started.held_out:
            return None
        best = convergence.best_save(self.validations, {saved.step for saved in self.adapters})
        return best.step if best else None

    @property
    def assessment(self) -> convergence.Assessment | None:
        """Whether the run is learning, ready or memorising, or None if that is not known yet."""
        ended = self.can_resume or self.state == "finished"
        return convergence.assess(self.validations, ended)


class Replay:
    """Follows a run by reading only the events that are new since the last call."""

    def __init__(self, folder: Path, curves: bool = True):
        """With `curves=False`, keeps only the last SPEED_WINDOW steps, to save memory."""
        self.folder = folder
        self.curves = curves
        self._start_over(0)

    def _start_over(self, inode: int) -> None:
        self._inode = inode
        self._offset = 0
        self._status = RunStatus(name=self.folder.name)

    def status(self) -> RunStatus:
        """Returns the present status. Its lists are shared with later results, and grow."""
        self._read_new_events()
        result = replace(self._status)
        alive = is_alive(self.folder)
        if not alive and requested(self.folder, "queued"):
            result.state = "queued"
        elif not alive and result.is_active:
            result.state = "interrupted"
            reason = _explain_interruption(self.folder, result)
            result.message = f"{reason} The last checkpoint is kept; press Resume."
        elif alive and result.is_active and requested(self.folder, "stop"):
            result.state = "stopping"
        return result

    def _read_new_events(self) -> None:
        path = self.folder / "events.jsonl"
        if not path.exists():
            return self._start_over(0)
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            # A deleted run can leave its name to another one.
            if stat.st_ino != self._inode or stat.st_size < self._offset:
                self._start_over(stat.st_ino)
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # The trainer is still writing this line.
                self._offset += len(line)
                event = events.parse_event(line)
                if event is not None:
                    apply_event(self._status, event)
        if not self.curves:
            for curve in (
                self._status.losses,
                self._status.learning_rates,
                self._status.step_seconds,
            ):
                del curve[:-SPEED_WINDOW]


def read_status(folder: Path) -> RunStatus:
    """Returns the status of a run from all its events. To follow a run, keep a `Replay`."""
    return Replay(folder).status()


def _explain_interruption(folder: Path, status: RunStatus) -> str:
    """Returns why a trainer ended without a last event, as far as it left traces."""
    if status.exit_code is not None:
        return describe_exit_code(status.exit_code)
    if status.boot and boot_id() and status.boot != boot_id():
        return "The machine was restarted while this run was training."
    log = folder / "log.txt"
    if log.is_file() and b"Fatal Python error" in log.read_bytes()[-20_000:]:
        return "The trainer crashed in a library or driver; the log contains the place."
    if disk_usage(folder).free < 2**20:
        return "The disk is full, so the trainer could not report why it ended. Make room."
    return (
        "The trainer ended without a message. It was killed, most often by the system because "
        "memory ran out, or the machine went down."
    )


def describe_exit_code(code: int) -> str:
    """Returns the meaning of an exit code. Negative codes are signals, large ones Windows'."""
    if code in (-signal.SIGTERM, -signal.SIGINT):
        return "The trainer was terminated before it could save."
    if code in (-9, 137):
        return (
            "The trainer was killed, most often by the system because memory ran out, "
            "or by a person."
        )
    if code in (-4, -6, -7, -8, -11, 0xC0000005, 0xC0000409, 0xC000001D, 139, 134):
        return (
            f"The trainer crashed in a library or driver (exit code {code:#x}). "
            "If that repeats, update the GPU driver."
        )
    return (
        f"The trainer ended with exit code {code} without a message. "
        "Its log may contain the reason."
    )


def _on_launched(status: RunStatus, event: events.Launched) -> None:
    status.state = "loading"
    status.launched_at = event.time
    status.boot = event.boot
    # An earlier end of the run no longer counts.
    status.message = ""
    status.finished = None
    status.exit_code = None
    status.file = ""


def _on_trainer_died(status: RunStatus, event: events.TrainerDied) -> None:
    status.exit_code = event.exit_code


def _on_progress(status: RunStatus, event: events.Progress) -> None:
    status.state = event.phase
    status.phase_done = event.done
    status.phase_total = event.total


def _on_started(status: RunStatus, event: events.Started) -> None:
    status.state = "training"
    status.started = event
    status.total_steps = event.total_steps
    status.last_step_at = event.time
    status.is_between_steps = False
    _forget_after(status, event.step)


def _on_step_done(status: RunStatus, event: events.StepDone) -> None:
    if status.is_between_steps and status.last_step_at is not None:
        # The clock of the events can jump, so a difference can be negative.
        seconds = max(0.0, event.time - status.last_step_at - event.seconds)
        status.seconds_between_steps.append(seconds)
    status.state = "training"
    status.step = event.step
    status.last_step_at = event.time
    status.is_between_steps = False
    status.losses.append((event.step, event.loss))
    status.learning_rates.append((event.step, event.learning_rate))
    status.step_seconds.append(event.seconds)


# A resumed run repeats validations, samples and saves. The lists are replaced rather than
# changed, because earlier results of `Replay.status` share them.
def _on_validated(status: RunStatus, event: events.Validated) -> None:
    status.is_between_steps = True
    others = [point for point in status.validations if point.step != event.step]
    status.validations = [*others, event]


def _on_sample_saved(status: RunStatus, event: events.SampleSaved) -> None:
    others = [sample for sample in status.samples if sample.file != event.file]
    status.samples = [*others, event]


def _on_probed(status: RunStatus, event: events.Probed) -> None:
    others = [probe for probe in status.probes if probe.step != event.step]
    status.probes = [*others, event]


def _on_adapter_saved(status: RunStatus, event: events.AdapterSaved) -> None:
    others = [adapter for adapter in status.adapters if adapter.file != event.file]
    status.adapters = [*others, event]


def _on_warned(status: RunStatus, event: events.Warned | events.MemoryRelieved) -> None:
    status.warnings.append(event.message)


def _on_rolled_back(status: RunStatus, event: events.RolledBack) -> None:
    status.warnings.append(event.message)
    _forget_after(status, event.step)


def _on_ended_early(status: RunStatus, event: events.EndedEarly) -> None:
    status.ended_early = event.message


def _on_paused(status: RunStatus, event: events.Paused) -> None:
    status.state = "paused"
    status.last_step_at = None


def _on_continued(status: RunStatus, event: events.Continued) -> None:
    status.state = "training"


def _on_stopped(status: RunStatus, event: events.Stopped) -> None:
    status.state = "stopped"
    _set_file(status, event)


def _on_failed(status: RunStatus, event: events.Failed) -> None:
    status.state = "failed"
    status.message = event.message


def _on_finished(status: RunStatus, event: events.Finished) -> None:
    status.state = "finished"
    status.finished = event
    _set_file(status, event)


def _set_file(status: RunStatus, event: events.Stopped | events.Finished) -> None:
    status.step = event.step
    status.file = event.file
    # Older versions did not write the step of the file: it was the last save.
    status.file_step = event.file_step or event.step


HANDLERS: dict[type[events.Event], Callable[[RunStatus, Any], None]] = {
    events.Launched: _on_launched,
    events.TrainerDied: _on_trainer_died,
    events.Progress: _on_progress,
    events.Started: _on_started,
    events.StepDone: _on_step_done,
    events.Validated: _on_validated,
    events.SampleSaved: _on_sample_saved,
    events.Probed: _on_probed,
    events.AdapterSaved: _on_adapter_saved,
    events.Warned: _on_warned,
    events.MemoryRelieved: _on_warned,
    events.RolledBack: _on_rolled_back,
    events.EndedEarly: _on_ended_early,
    events.Paused: _on_paused,
    events.Continued: _on_continued,
    events.Stopped: _on_stopped,
    events.Failed: _on_failed,
    events.Finished: _on_finished,
}


def apply_event(status: RunStatus, event: events.Event) -> None:
    """Changes the status by one event. Events without a handler change nothing."""
    handler = HANDLERS.get(type(event))
    if handler is not None:
        handler(status, event)


def _forget_after(status: RunStatus, step: int) -> None:
    """Removes everything after a step, because a run that goes back to it repeats the rest."""
    status.step = step
    status.ended_early = ""
    for name in ("losses", "learning_rates"):
        pairs = getattr(status, name)
        setattr(status, name, [pair for pair in pairs if pair[0] <= step])
    for name in ("validations", "samples", "probes", "adapters"):
        entries = getattr(status, name)
        setattr(status, name, [entry for entry in entries if entry.step <= step])

"""The status of a run, worked out from its events and its lock."""

import math
import os
import signal
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import disk_usage

from trainer.runs import convergence, events
from trainer.runs.run_lock import boot_id, is_alive
from trainer.runs.run_requests import requested

SPEED_WINDOW = 50  # steps by which the speed is told


@dataclass
class RunStatus:
    """All that a page shows of a run, worked out from its folder alone."""

    name: str
    state: str = "new"
    """new, queued, waiting, loading, downloading, caching, sampling, training, paused, stopping, stopped,
    finished, failed or interrupted."""
    phase_done: int = 0
    phase_total: int = 0
    step: int = 0
    total_steps: int = 0
    started: events.Started | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)
    measured: list[events.Validated] = field(default_factory=list)
    learning_rates: list[tuple[int, float]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    samples: list[events.SampleSaved] = field(default_factory=list)
    probes: list[events.Probed] = field(default_factory=list)
    adapters: list[events.AdapterSaved] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    message: str = ""
    """Why it failed, in a sentence."""
    finished: events.Finished | None = None
    file: str = ""
    """The adapter that was handed out when it finished or was stopped; "" while there is none."""
    file_step: int = 0
    """The save that this file is."""
    launched_at: float = 0.0
    boot: str = ""
    exit_code: int | None = None
    """Of a trainer that died without a word."""
    stations: list[float] = field(default_factory=list)
    """Seconds that each measuring, saving and sampling took."""
    last_step_at: float | None = None
    """When the last step ended; None where what came since was no work (a pause)."""
    at_station: bool = False
    ended_early: str = ""
    """Why it ended before its last step, in a sentence."""

    @property
    def validation(self) -> list[tuple[int, float]]:
        """(step, loss on the held-out pictures), where that is a number that can be drawn."""
        return [(point.step, point.loss) for point in self.measured if math.isfinite(point.loss)]

    @property
    def adapter(self) -> str:
        """The file to hand out: the chosen one of a run that ended, else the latest save; "" before the first."""
        return self.file or (self.adapters[-1].file if self.adapters else "")

    @property
    def is_active(self) -> bool:
        return self.state in (
            "waiting",
            "loading",
            "downloading",
            "caching",
            "sampling",
            "training",
            "paused",
            "stopping",
        )

    @property
    def can_resume(self) -> bool:
        return self.state in ("stopped", "failed", "interrupted")

    @property
    def seconds_per_step(self) -> float | None:
        """Median of the last steps: one slow step (a first one, a busy machine) does not move it."""
        return statistics.median(self.step_seconds[-SPEED_WINDOW:]) if self.step_seconds else None

    @property
    def images_per_second(self) -> float | None:
        speed = self.seconds_per_step
        return self.started.images_per_step / speed if speed and self.started else None

    @property
    def seconds_left(self) -> float | None:
        """Of the steps at the present speed, and of the saves (with their samples) that are still to come."""
        speed = self.seconds_per_step
        if speed is None:
            return None
        saves = self.started.saves if self.started else 0
        saves_left = saves - max(0, self.step - 1) * saves // max(
            1, self.total_steps
        )  # one is counted until it is done
        station = statistics.median(self.stations) if self.stations else 0.0
        return speed * (self.total_steps - self.step) + station * saves_left

    @property
    def best_step(self) -> int | None:
        """The save with the best loss on held-out pictures (`guidance.best_save`); None where none are held out."""
        if not self.started or not self.started.held_out:
            return None
        steps = {saved.step for saved in self.adapters}
        best = convergence.best_save(self.measured, steps)
        return best.step if best else None

    @property
    def reading(self) -> convergence.Reading | None:
        """Whether it learns, is ready or memorises; None where nothing says so yet."""
        return convergence.read(self.measured, ended=self.can_resume or self.state == "finished")


class Replay:
    """A run's events, read on from where the last look ended: a long run costs no more to follow than a short one."""

    def __init__(self, folder: Path, curves: bool = True):
        """Without `curves`, only the end of what each step said is kept."""
        self.folder, self.curves = folder, curves
        self._begin(0)

    def _begin(self, inode: int) -> None:
        self._inode, self._offset, self._known = inode, 0, RunStatus(name=self.folder.name)

    def status(self) -> RunStatus:
        """All that is known now. Its lists are shared with later looks, and only ever grow."""
        self._read_on()
        result, alive = replace(self._known), is_alive(self.folder)
        if requested(self.folder, "queued") and not alive:
            result.state = "queued"
        elif not alive and result.is_active:
            result.state = "interrupted"
            result.message = (
                f"{_how_it_ended(self.folder, result)} The last state is kept; press Resume."
            )
        elif alive and requested(self.folder, "stop") and result.is_active:
            result.state = "stopping"
        return result

    def _read_on(self) -> None:
        path = self.folder / "events.jsonl"
        if not path.exists():
            return self._begin(0)
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            if (
                found.st_ino != self._inode or found.st_size < self._offset
            ):  # another run under the same name
                self._begin(found.st_ino)
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # still being written
                self._offset += len(line)
                event = events.parse_event(line)
                if event is not None:
                    _apply(self._known, event)
        if not self.curves:
            for curve in (self._known.losses, self._known.learning_rates, self._known.step_seconds):
                del curve[:-SPEED_WINDOW]


def read_status(folder: Path) -> RunStatus:
    """Replays a run's events from the first one; who looks again and again keeps a `Replay`."""
    return Replay(folder).status()


def _how_it_ended(folder: Path, result: RunStatus) -> str:
    """Of a trainer that is gone without a last event: from its exit code, the start of the machine, its log, the disk."""
    if result.exit_code is not None:
        return describe_exit_code(result.exit_code)
    if result.boot and boot_id() and result.boot != boot_id():
        return "The machine was restarted while this run was training."
    log = folder / "log.txt"
    if log.is_file() and b"Fatal Python error" in log.read_bytes()[-20_000:]:
        return "The trainer crashed in the code of a library or driver; the log shows where."
    if disk_usage(folder).free < 2**20:
        return "The disk is full, so that the trainer could not even say why it ended. Make room."
    return "The trainer ended without a word: it was killed (often by the system, for want of memory), or the machine went down."


def describe_exit_code(code: int) -> str:
    """What an exit code without a message means; negative ones are signals, large ones those of Windows."""
    if code in (-signal.SIGTERM, -2):
        return "The trainer was told to end before it could save."
    if code in (-9, 137):
        return (
            "The trainer was killed: by the system for want of memory (most often), or by a person."
        )
    if code in (-4, -6, -7, -8, -11, 0xC0000005, 0xC0000409, 0xC000001D, 139, 134):
        return f"The trainer crashed in the code of a library or driver (exit code {code:#x}); update the GPU driver if that repeats."
    return f"The trainer ended with exit code {code} without a word; its log may say more."


def _apply(result: RunStatus, event: events.Event) -> None:
    match event:
        case events.Launched():
            result.state, result.message, result.launched_at, result.finished = (
                "loading",
                "",
                event.time,
                None,
            )
            result.exit_code, result.boot, result.file = None, event.boot, ""
        case events.TrainerDied():
            result.exit_code = event.exit_code
        case events.Progress():
            result.state, result.phase_done, result.phase_total = (
                event.phase,
                event.done,
                event.total,
            )
        case events.Started():
            result.started, result.total_steps = event, event.total_steps
            result.last_step_at, result.at_station = event.time, False
            _forget_after(result, event.step)
            result.state = "training"
        case events.StepDone():
            if result.at_station and result.last_step_at is not None:
                result.stations.append(max(0.0, event.time - result.last_step_at - event.seconds))
            result.last_step_at, result.at_station = event.time, False
            result.state, result.step = "training", event.step
            result.losses.append((event.step, event.loss))
            result.learning_rates.append((event.step, event.learning_rate))
            result.step_seconds.append(event.seconds)
        case events.Validated():
            result.measured = [point for point in result.measured if point.step != event.step] + [
                event
            ]
            result.at_station = True
        case events.SampleSaved():
            result.samples = [saved for saved in result.samples if saved.file != event.file] + [
                event
            ]
        case events.Probed():
            result.probes = [probe for probe in result.probes if probe.step != event.step] + [event]
        case events.AdapterSaved():
            result.adapters = [saved for saved in result.adapters if saved.file != event.file] + [
                event
            ]
        case events.Warned() | events.MemoryRelieved():
            result.warnings.append(event.message)
        case events.RolledBack():
            result.warnings.append(event.message)
            _forget_after(result, event.step)
        case events.EndedEarly():
            result.ended_early = event.message
        case events.Paused():
            result.state, result.last_step_at = "paused", None
        case events.Continued():
            result.state = "training"
        case events.Stopped():
            result.state, result.step, result.file, result.file_step = (
                "stopped",
                event.step,
                event.file,
                event.file_step or event.step,
            )
        case events.Failed():
            result.state, result.message = "failed", event.message
        case events.Finished():
            result.state, result.finished, result.step = "finished", event, event.step
            result.file, result.file_step = event.file, event.file_step or event.step


def _forget_after(result: RunStatus, step: int) -> None:
    """A resumed run repeats the steps after its last state: what the first try wrote about them is superseded."""
    result.step = step
    result.ended_early = ""
    for name in ("losses", "learning_rates"):
        setattr(result, name, [point for point in getattr(result, name) if point[0] <= step])
    for name in ("measured", "samples", "probes", "adapters"):
        setattr(result, name, [saved for saved in getattr(result, name) if saved.step <= step])

"""What happened in a run, one JSON line each. The page, the terminal and the tests read only this.

Lines are only ever appended, each with a single write, so that a reader sees whole lines or none.
A reader skips what it does not know: logs of other versions stay readable.
"""

import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path


@dataclass(frozen=True)
class Event:
    time: float = field(default_factory=time.time, kw_only=True)
    """Seconds since 1970. For showing only: durations are measured by the trainer's monotonic clock."""


@dataclass(frozen=True)
class Launched(Event):
    """A trainer process took the run. A resumed run has several of these."""

    pid: int
    version: str
    boot: str = ""
    """Which start of the machine it was, where the system tells."""


@dataclass(frozen=True)
class Progress(Event):
    """How far a phase other than the steps has come: "loading", "downloading" (in megabytes), "caching" or "sampling"."""

    phase: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class Started(Event):
    """All is loaded and checked; steps follow."""

    step: int
    total_steps: int
    pictures: int
    held_out: int
    trainable_parameters: int
    device: str
    precision: str
    attention: str
    family: str
    saves: int = 0
    """How often the run is measured, saved and sampled in all."""
    images_per_step: int = 1
    parameters: dict[str, int] = field(default_factory=dict)
    """What is trained of each component."""
    base_parameters: dict[str, int] = field(default_factory=dict)
    """The weights of those components."""


@dataclass(frozen=True)
class StepDone(Event):
    step: int
    loss: float
    learning_rate: float
    seconds: float
    """Duration of the step alone, without saving or sampling."""


@dataclass(frozen=True)
class Validated(Event):
    """What the adapter makes of pictures at fixed noise and timesteps."""

    step: int
    loss: float
    """On the held-out pictures; on training pictures where none are held out."""
    parts: list[float] = field(default_factory=list)
    """What that is the mean of: a number for each held-out picture, or for each draw of noise where there are fewer than eight."""
    training_loss: float | None = None
    """On some of the training pictures, in the same way; None where none are held out."""


@dataclass(frozen=True)
class SampleSaved(Event):
    step: int
    prompt: str
    seed: int
    file: str
    """Relative to the run folder. Step 0 is the base without an adapter."""


@dataclass(frozen=True)
class Probed(Event):
    """What the samples of a save give away."""

    step: int
    prompt: str = ""
    """The first sample prompt without its trigger word."""
    seed: int = 0
    file: str = ""
    """The picture of that prompt, relative to the run folder; empty where the prompt has no trigger word."""
    leak: float | None = None
    """How much of the change with the trigger is there without it: 0 none, 1 as much."""
    likeness: float | None = None
    """Of the samples to the nearest training picture, -1..1, in colour and layout."""
    likeness_between: float | None = None
    """Of the training pictures to each other, in the same measure."""


@dataclass(frozen=True)
class AdapterSaved(Event):
    step: int
    file: str
    validation_loss: float | None = None


@dataclass(frozen=True)
class StateSaved(Event):
    step: int


@dataclass(frozen=True)
class Warned(Event):
    message: str


@dataclass(frozen=True)
class MemoryRelieved(Event):
    """Memory ran out in a phase ("load", "cache", "step", "validate", "sample") and a measure of `memory.FALLBACKS_BY_PHASE` was taken."""

    step: int
    phase: str
    rung: str
    message: str


@dataclass(frozen=True)
class RolledBack(Event):
    """The numbers went wrong: training goes on from an earlier step with a lower learning rate."""

    step: int
    from_step: int
    lr_scale: float
    """What the learning rate of the settings is multiplied with from here on."""
    message: str


@dataclass(frozen=True)
class Paused(Event):
    step: int


@dataclass(frozen=True)
class Continued(Event):
    step: int


@dataclass(frozen=True)
class Stopped(Event):
    """The person asked the run to end early; it can be resumed."""

    step: int
    file: str
    file_step: int = 0
    """The save that the file is."""


@dataclass(frozen=True)
class EndedEarly(Event):
    """The held-out loss did not fall any more, and `training.early_stop` asks to end then."""

    step: int
    best_step: int
    message: str


@dataclass(frozen=True)
class Failed(Event):
    message: str


@dataclass(frozen=True)
class TrainerDied(Event):
    """The page saw its trainer end without having said why."""

    exit_code: int


@dataclass(frozen=True)
class Finished(Event):
    step: int
    file: str
    best_step: int
    """The save with the best held-out loss; the last one where none are held out."""
    seconds: float
    file_step: int = 0
    """The save that the file is; 0 in the logs of older versions: the last one."""


@dataclass(frozen=True)
class Captioned(Event):
    """A picture of a dataset got a caption by a model."""

    file: str
    caption: str


@dataclass(frozen=True)
class CaptionsDone(Event):
    """A captioning job ended, by itself or because it was asked to."""

    written: int
    kept: int
    """Pictures that had a caption already and kept it."""
    stopped: bool = False


KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in Event.__subclasses__()}


class EventLog:
    """Appends events to a file."""

    def __init__(self, path: Path):
        self.path = path
        self.listeners: list[Callable[[Event], None]] = []
        """Told of each event after it is written."""
        if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            self._write(b"\n")  # a line cut by a power loss must not swallow the first one after it

    def append(self, event: Event) -> None:
        line = (
            json.dumps({"event": type(event).__name__, **asdict(event)}, ensure_ascii=True) + "\n"
        )
        self._write(line.encode("ascii"))
        for listener in tuple(self.listeners):
            listener(event)

    def close(self) -> None:
        """The run ended; a log that shows it may have to tidy up."""

    def _write(self, line: bytes) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            if os.write(descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        finally:
            os.close(descriptor)


class SilentLog(EventLog):
    """Of a process that trains beside the one that writes."""

    def __init__(self) -> None:
        self.path, self.listeners = Path(os.devnull), []

    def append(self, event: Event) -> None:
        pass


def parse_event(line: str | bytes) -> Event | None:
    """One line as an event; None for a cut line or an event of another version."""
    try:
        data = json.loads(line)
        kind = KINDS[data.pop("event")]
        known = {f.name for f in fields(kind)}
        return kind(**{key: value for key, value in data.items() if key in known})
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def read_events(path: Path) -> Iterator[Event]:
    """All events of a run, oldest first; none where the file is not there yet."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            event = parse_event(line)
            if event is not None:
                yield event

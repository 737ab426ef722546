"""The events of a run, one JSON object per line in events.jsonl.

The page, the terminal and the trackers read nothing else. A reader skips events and fields that
it does not know, so logs of older and newer versions stay readable.
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
    """Seconds since 1970, for display. Durations come from the trainer's monotonic clock."""


@dataclass(frozen=True)
class Launched(Event):
    """A trainer process started. A resumed run has several of these events."""

    pid: int
    version: str
    boot: str = ""
    """The `run_lock.boot_id` of the machine."""


@dataclass(frozen=True)
class Progress(Event):
    """Progress of a phase other than training.

    The phases are "waiting", "loading", "downloading" (in megabytes), "caching" and "sampling".
    """

    phase: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class Started(Event):
    """Everything is loaded and checked, and the first step follows."""

    step: int
    """The step to start from: 0, or the step of the checkpoint."""
    total_steps: int
    pictures: int
    """Training images."""
    held_out: int
    """Images of the validation set."""
    trainable_parameters: int
    device: str
    precision: str
    attention: str
    family: str
    saves: int = 0
    """How many times the whole run validates, saves and samples."""
    images_per_step: int = 1
    parameters: dict[str, int] = field(default_factory=dict)
    """Trained parameters by component."""
    base_parameters: dict[str, int] = field(default_factory=dict)
    """Parameters of the same components in the base model."""
    threads: int = 0
    """CPU threads, which a resumed run keeps. 0 on other devices and in old logs."""


@dataclass(frozen=True)
class StepDone(Event):
    step: int
    loss: float
    learning_rate: float
    seconds: float
    """Duration of the step alone, without saving or sampling."""


@dataclass(frozen=True)
class Validated(Event):
    """Losses measured at fixed noise and timesteps."""

    step: int
    loss: float
    """The mean on the validation set, or on training images if the validation set is empty."""
    parts: list[float] = field(default_factory=list)
    """One loss per validation image.

    With fewer than eight images, one loss per image and draw of noise.
    """
    training_loss: float | None = None
    """The mean on some training images, or None if the validation set is empty."""


@dataclass(frozen=True)
class SampleSaved(Event):
    step: int
    """0 for the base model without an adapter."""
    prompt: str
    seed: int
    file: str
    """Relative to the run folder."""


@dataclass(frozen=True)
class Probed(Event):
    """Measurements on the samples of a save."""

    step: int
    prompt: str = ""
    """The first sample prompt without its trigger word."""
    seed: int = 0
    file: str = ""
    """The sample of that prompt in the run folder, or "" if the prompt has no trigger word."""
    leak: float | None = None
    """The change without the trigger word, as a fraction of the change with it."""
    likeness: float | None = None
    """Similarity of the samples to their nearest training image, in -1..1."""
    likeness_between: float | None = None
    """The same similarity between the training images."""


@dataclass(frozen=True)
class AdapterSaved(Event):
    step: int
    file: str
    validation_loss: float | None = None


@dataclass(frozen=True)
class StateSaved(Event):
    """A checkpoint was saved."""

    step: int


@dataclass(frozen=True)
class Warned(Event):
    message: str


@dataclass(frozen=True)
class MemoryRelieved(Event):
    """A phase ran out of memory and applied a fallback of `FALLBACKS_BY_PHASE`.

    The phases are "load", "cache", "step", "validate" and "sample".
    """

    step: int
    phase: str
    rung: str
    """The name of the fallback."""
    message: str


@dataclass(frozen=True)
class RolledBack(Event):
    """Losses were not finite, so training continues from an earlier step, more slowly."""

    step: int
    from_step: int
    lr_scale: float
    """The factor on the learning rate of the settings from this step on."""
    message: str


@dataclass(frozen=True)
class Paused(Event):
    step: int


@dataclass(frozen=True)
class Continued(Event):
    step: int


@dataclass(frozen=True)
class Stopped(Event):
    """A person stopped the run, which can be resumed."""

    step: int
    file: str
    file_step: int = 0
    """The step of the save that became the file."""


@dataclass(frozen=True)
class EndedEarly(Event):
    """The validation loss stopped falling, and `training.early_stop` ends the run."""

    step: int
    best_step: int
    message: str


@dataclass(frozen=True)
class Failed(Event):
    message: str


@dataclass(frozen=True)
class TrainerDied(Event):
    """The trainer process ended without a last event. Written by the page."""

    exit_code: int


@dataclass(frozen=True)
class Finished(Event):
    step: int
    file: str
    best_step: int
    """The save with the best validation loss, or the last save without a validation set."""
    seconds: float
    file_step: int = 0
    """The step of the save that became the file. 0 in logs of older versions: the last save."""


@dataclass(frozen=True)
class Captioned(Event):
    """A model wrote the caption of an image."""

    file: str
    caption: str


@dataclass(frozen=True)
class CaptionsDone(Event):
    """A captioning job ended."""

    written: int
    kept: int
    """Images that kept the caption they had."""
    stopped: bool = False
    """Whether a person stopped the job."""


EVENT_TYPES: dict[str, type[Event]] = {kind.__name__: kind for kind in Event.__subclasses__()}


class EventLog:
    """Appends events to a file, each with a single write, so that readers see whole lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listeners: list[Callable[[Event], None]] = []
        """Called with each event after it is written."""
        if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            # End a line that a power cut left unfinished, so that the next line stays readable.
            self._write(b"\n")

    def append(self, event: Event) -> None:
        """Writes an event, then calls the listeners. Raises OSError if the disk is full."""
        line = json.dumps({"event": type(event).__name__, **asdict(event)}, ensure_ascii=True)
        self._write(f"{line}\n".encode("ascii"))
        # A listener may remove itself while it is called.
        for listener in tuple(self.listeners):
            listener(event)

    def close(self) -> None:
        """Called at the end of the run. A subclass with a display closes it here."""

    def _write(self, line: bytes) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            if os.write(descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        finally:
            os.close(descriptor)


class SilentLog(EventLog):
    """Discards events. In distributed training all ranks but rank 0 use it."""

    def __init__(self) -> None:
        self.path = Path(os.devnull)
        self.listeners = []

    def append(self, event: Event) -> None:
        pass


def parse_event(line: str | bytes) -> Event | None:
    """Returns the event in a line, or None if the line is cut or its event is unknown."""
    try:
        data = json.loads(line)
        event_type = EVENT_TYPES[data.pop("event")]
        known = {f.name for f in fields(event_type)}
        return event_type(**{key: value for key, value in data.items() if key in known})
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def read_events(path: Path) -> Iterator[Event]:
    """Yields all events of a run, oldest first. Yields nothing if the file does not exist."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            event = parse_event(line)
            if event is not None:
                yield event

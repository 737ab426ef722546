"""What happens in a run, reported to TensorBoard, W&B or trackio as well, through accelerate's trackers.

A tracker is never needed for a training: what it cannot do is a warning, and the events stay the truth.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from trainer import config
from trainer.config import RunConfig
from trainer.errors import ConfigError
from trainer.runs import events
from trainer.runs.events import Event, EventLog, Warned

PROJECT = "lora-atelier"


@contextmanager
def tracked(run: RunConfig, folder: Path, log: EventLog) -> Iterator[None]:
    """Reports while the block lasts, if the run asks for it. Raises ConfigError where the tracker is not installed."""
    if run.saving.tracking == "none":
        yield
        return
    reporter = Reporter(run, folder, log)
    log.listeners.append(reporter)
    try:
        yield
    finally:
        log.listeners.remove(reporter)
        reporter.finish()


class Reporter:
    """An accelerate tracker that is told of events."""

    def __init__(self, run: RunConfig, folder: Path, log: EventLog):
        name = run.saving.tracking
        if find_spec(name) is None:
            raise ConfigError(
                f"saving.tracking = {name} needs the package {name}: run `pip install {name}`, or choose none."
            )
        self.name, self.folder, self.log, self.tracker = name, folder, log, None
        try:
            self.tracker = build(name, folder)
            self.tracker.start()
            self.tracker.store_init_configuration(
                {path: flat(config.get(run, path)) for path, _ in config.fields()}
            )
        except Exception as error:  # signed out, offline, a full disk: whatever a tracker's library raises, the training goes on
            self._give_up(error)

    def __call__(self, event: Event) -> None:
        if self.tracker is None:
            return
        try:
            report(self.tracker, event, self.folder)
        except Exception as error:
            self._give_up(error)

    def finish(self) -> None:
        if self.tracker is None:
            return
        try:
            self.tracker.finish()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.tracker = None
        self.log.append(
            Warned(
                f"Nothing more is reported to {self.name} ({str(error)[:200]}); the training goes on."
            )
        )


def build(name: str, folder: Path):
    """The tracker of a run: its project is this program, its name that of the run folder."""
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

    PartialState()  # their methods ask it whether this is the main process
    if name == "tensorboard":
        return TensorBoardTracker("tracking", logging_dir=folder)
    if name == "wandb":
        return WandBTracker(PROJECT, name=folder.name, dir=str(folder))
    return TrackioTracker(PROJECT, name=folder.name)


def flat(value: object) -> object:
    """A tracker takes texts and numbers."""
    return value if isinstance(value, int | float | str | bool) else str(value)


def report(tracker, event: Event, folder: Path) -> None:
    match event:
        case events.StepDone():
            tracker.log(
                {
                    "loss": event.loss,
                    "learning_rate": event.learning_rate,
                    "seconds_per_step": event.seconds,
                },
                step=event.step,
            )
        case events.Validated():
            tracker.log({"validation_loss": event.loss}, step=event.step)
        case events.SampleSaved() if hasattr(tracker, "log_images"):
            import numpy
            from PIL import Image

            with Image.open(folder / event.file) as image:
                tracker.log_images(
                    {event.prompt[:80]: numpy.asarray(image.convert("RGB"))[None]},
                    step=event.step,
                    **image_layout(tracker),
                )


def image_layout(tracker) -> dict[str, str]:
    return {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}

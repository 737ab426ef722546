"""Reports a run to TensorBoard, W&B or trackio as well, through accelerate's trackers.

A tracker is optional: whatever it cannot do becomes a warning, and the training continues.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainer import config
from trainer.config import RunConfig
from trainer.errors import ConfigError
from trainer.runs import events
from trainer.runs.events import Event, EventLog, Warned

PROJECT = "lora-atelier"
MAX_LABEL = 80
"""Characters of a prompt that label its sample."""


@contextmanager
def tracked(run: RunConfig, folder: Path, log: EventLog) -> Iterator[None]:
    """Reports the events of a block if `saving.tracking` names a tracker.

    Raises ConfigError if the package of the tracker is not installed.
    """
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
    """A listener of an EventLog that passes events on to an accelerate tracker."""

    def __init__(self, run: RunConfig, folder: Path, log: EventLog) -> None:
        self.name = run.saving.tracking
        self.folder = folder
        self.log = log
        self.tracker: Any = None
        """A `GeneralTracker`, or None after it failed."""
        if find_spec(self.name) is None:
            raise ConfigError(
                f"saving.tracking = {self.name} needs the package {self.name}. "
                f"Run `pip install {self.name}`, or choose none."
            )
        # Trackers raise errors of any type, for example if they are offline or signed out.
        try:
            self.tracker = build(self.name, folder)
            self.tracker.start()
            settings = {path: _as_text(config.get(run, path)) for path, _ in config.fields()}
            self.tracker.store_init_configuration(settings)
        except Exception as error:
            self._give_up(error)

    def __call__(self, event: Event) -> None:
        if self.tracker is None:
            return
        try:
            report(self.tracker, event, self.folder)
        except Exception as error:
            self._give_up(error)

    def finish(self) -> None:
        """Ends the tracker's run, which may upload what is left."""
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
                f"Cannot report to {self.name} any more ({str(error)[:200]}). "
                "The training continues."
            )
        )


def build(name: str, folder: Path) -> Any:
    """Returns the accelerate tracker of a run, named after its folder."""
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

    # Tracker methods read from it whether this process is rank 0.
    PartialState()
    if name == "tensorboard":
        return TensorBoardTracker("tracking", logging_dir=folder)
    if name == "wandb":
        return WandBTracker(PROJECT, name=folder.name, dir=str(folder))
    return TrackioTracker(PROJECT, name=folder.name)


def _as_text(value: object) -> int | float | str:
    """Returns a setting in a type that all trackers accept."""
    return value if isinstance(value, int | float | str) else str(value)


def report(tracker: Any, event: Event, folder: Path) -> None:
    """Passes losses, learning rates and samples on to a tracker. Other events are ignored."""
    if isinstance(event, events.StepDone):
        values = {
            "loss": event.loss,
            "learning_rate": event.learning_rate,
            "seconds_per_step": event.seconds,
        }
        tracker.log(values, step=event.step)
    elif isinstance(event, events.Validated):
        tracker.log({"validation_loss": event.loss}, step=event.step)
    elif isinstance(event, events.SampleSaved) and hasattr(tracker, "log_images"):
        _report_sample(tracker, event, folder)


def _report_sample(tracker: Any, event: events.SampleSaved, folder: Path) -> None:
    import numpy
    from PIL import Image

    with Image.open(folder / event.file) as image:
        batch = numpy.asarray(image.convert("RGB"))[None]
    # TensorBoard expects channels first unless it gets a layout.
    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
    tracker.log_images({event.prompt[:MAX_LABEL]: batch}, step=event.step, **layout)

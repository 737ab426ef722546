"""A run's events as lines and a progress bar in the terminal."""

import sys

from tqdm import tqdm

from trainer import config
from trainer.runs import events, run_status
from trainer.runs.convergence import what_to_change
from trainer.runs.events import Event, EventLog

LEAKS = 0.5  # of the change with the trigger; from here on it is said


class TerminalLog(EventLog):
    """Writes events to the run folder, and shows them."""

    bar: tqdm | None = None
    zone: str = ""
    """The last one that was said."""

    def append(self, event: Event) -> None:
        super().append(event)
        match event:
            case events.Started():
                self._say(
                    f"{event.family} on {event.device}, {event.precision}, {event.attention}; {event.pictures} pictures, "
                    f"{event.held_out} more held out, {event.trainable_parameters:,} parameters to train"
                    + "".join(
                        f"; {count / event.base_parameters[part]:.2%} of the {part}"
                        for part, count in event.parameters.items()
                    )
                )
                self.bar = tqdm(
                    total=event.total_steps,
                    initial=event.step,
                    unit="step",
                    file=sys.stdout,
                    dynamic_ncols=True,
                    disable=None,
                )  # a log file wants no bar
            case events.Progress(phase="downloading"):
                self._say(f"Downloading the base model: {event.done:,}/{event.total:,} MB")
            case events.Progress(phase="caching"):
                self._say(f"Caching pictures and captions: {event.done}/{event.total}")
            case events.Progress(phase="waiting"):
                self._say("Another run has the device; this one starts when that ends.")
            case events.StepDone() if self.bar is not None:
                self.bar.set_postfix(loss=f"{event.loss:.4f}", refresh=False)
                self.bar.update()
            case events.AdapterSaved():
                self._say(
                    f"Step {event.step}: saved {event.file}"
                    + (
                        ""
                        if event.validation_loss is None
                        else f", validation loss {event.validation_loss:.4f}"
                    )
                )
                self._guide()
            case events.Warned() | events.MemoryRelieved() | events.RolledBack():
                self._say(f"Warning: {event.message}")
            case events.Paused():
                self._say(f"Paused after step {event.step}")
            case events.Stopped():
                self._say(
                    f"Stopped after step {event.step}; everything is saved, and `resume` goes on from here"
                )
            case events.Probed() if event.leak is not None and event.leak > LEAKS:
                self._say(
                    f"Step {event.step}: without its trigger word the adapter changes pictures {event.leak:.0%} as much as with it."
                )
            case events.EndedEarly():
                self._say(event.message)
            case events.Finished():
                self._say(
                    f"Finished {event.step} steps in {event.seconds:.0f} s; {event.file} is the save of step {event.file_step}"
                )
                self._guide(ended=True)

    def _guide(self, ended: bool = False) -> None:
        """Says where the run stands, when it has come into another zone and at the end; then also what to change."""
        status = run_status.read_status(self.path.parent)
        reading = status.reading
        if reading and (ended or reading.zone != self.zone):
            self.zone = reading.zone
            self._say(f"{reading.zone.capitalize()}: {reading.sentence}")
            whole = (status.seconds_per_step or 0.0) * status.total_steps
            changes = (
                what_to_change(config.load(self.path.parent / "run.toml"), reading, whole)
                if ended
                else []
            )
            if changes:
                self._say(f"For another run: {'; '.join(changes)}.")

    def _say(self, line: str) -> None:
        tqdm.write(
            line.encode(sys.stdout.encoding or "utf-8", "backslashreplace").decode(
                sys.stdout.encoding or "utf-8"
            ),
            file=sys.stdout,
        )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

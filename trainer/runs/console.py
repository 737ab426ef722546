"""The terminal display of a run: its events as lines, and a progress bar."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer import config
from trainer.runs import convergence, events, run_status

LEAK_TO_REPORT = 0.5
"""The `Probed.leak` above which the terminal reports it."""


def _started_line(event: events.Started) -> str:
    line = (
        f"{event.family} on {event.device}, {event.precision}, {event.attention}; "
        f"{event.pictures} images, {event.held_out} more in the validation set; "
        f"{event.trainable_parameters:,} parameters to train"
    )
    for component, count in event.parameters.items():
        line += f"; {count / event.base_parameters[component]:.2%} of the {component}"
    return line


def _progress_line(event: events.Progress) -> str:
    if event.phase == "downloading":
        return f"Downloading the base model: {event.done:,}/{event.total:,} MB"
    if event.phase == "caching":
        return f"Caching images and captions: {event.done}/{event.total}"
    if event.phase == "waiting":
        return "Another run uses the device; this run starts when that one ends."
    return ""


def _saved_line(event: events.AdapterSaved) -> str:
    line = f"Step {event.step}: saved {event.file}"
    if event.validation_loss is not None:
        line += f", validation loss {event.validation_loss:.4f}"
    return line


def _probed_line(event: events.Probed) -> str:
    if event.leak is None or event.leak <= LEAK_TO_REPORT:
        return ""
    return (
        f"Step {event.step}: without its trigger word the adapter changes images "
        f"{event.leak:.0%} as much as with it."
    )


def _warning_line(event: events.Warned | events.MemoryRelieved | events.RolledBack) -> str:
    return f"Warning: {event.message}"


def _paused_line(event: events.Paused) -> str:
    return f"Paused after step {event.step}"


def _stopped_line(event: events.Stopped) -> str:
    return f"Stopped after step {event.step}. Everything is saved; `resume` continues from here."


def _ended_early_line(event: events.EndedEarly) -> str:
    return event.message


def _finished_line(event: events.Finished) -> str:
    return (
        f"Finished {event.step} steps in {event.seconds:.0f} s; "
        f"{event.file} is the save of step {event.file_step}"
    )


LINES: dict[type[events.Event], Callable[[Any], str]] = {
    events.Started: _started_line,
    events.Progress: _progress_line,
    events.AdapterSaved: _saved_line,
    events.Probed: _probed_line,
    events.Warned: _warning_line,
    events.MemoryRelieved: _warning_line,
    events.RolledBack: _warning_line,
    events.Paused: _paused_line,
    events.Stopped: _stopped_line,
    events.EndedEarly: _ended_early_line,
    events.Finished: _finished_line,
}
"""The function that describes an event in a line, or "" to print nothing."""


class TerminalLog(events.EventLog):
    """Writes events to the run folder and shows them in the terminal."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.bar: tqdm[Any] | None = None
        self.zone = ""
        """The last zone of the assessment that was printed."""

    def append(self, event: events.Event) -> None:
        super().append(event)
        describe = LINES.get(type(event))
        line = describe(event) if describe else ""
        if line:
            self._print(line)
        if isinstance(event, events.Started):
            self.bar = _new_bar(event)
        elif isinstance(event, events.StepDone) and self.bar is not None:
            self.bar.set_postfix(loss=f"{event.loss:.4f}", refresh=False)
            self.bar.update()
        elif isinstance(event, events.AdapterSaved):
            self._print_assessment()
        elif isinstance(event, events.Finished):
            self._print_assessment(ended=True)

    def _print_assessment(self, ended: bool = False) -> None:
        """Prints the assessment if its zone changed, and at the end also what to change."""
        folder = self.path.parent
        status = run_status.read_status(folder)
        assessment = status.assessment
        if assessment is None or (assessment.zone == self.zone and not ended):
            return
        self.zone = assessment.zone
        self._print(f"{assessment.zone.capitalize()}: {assessment.sentence}")
        if not ended:
            return
        seconds = (status.seconds_per_step or 0.0) * status.total_steps
        run = config.load(folder / "run.toml")
        changes = convergence.suggest_changes(run, assessment, seconds)
        if changes:
            self._print(f"For the next run: {'; '.join(changes)}.")

    def _print(self, line: str) -> None:
        encoding = sys.stdout.encoding or "utf-8"
        # A terminal with a small character set gets escapes instead of a UnicodeEncodeError.
        printable = line.encode(encoding, "backslashreplace").decode(encoding)
        tqdm.write(printable, file=sys.stdout)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _new_bar(event: events.Started) -> "tqdm[Any]":
    return tqdm(
        total=event.total_steps,
        initial=event.step,
        unit="step",
        file=sys.stdout,
        dynamic_ncols=True,
        disable=None,  # No bar if the output is a file.
    )

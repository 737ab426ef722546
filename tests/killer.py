"""Trains runs that are killed with SIGKILL at chosen events, and resumes them until they finish.

    python tests/killer.py JOB.json

The job is {"runs": [{"folder": ..., "kills": [["StepDone", 3], ["StateSaved", 4]]}, ...]}. Each
trainer is a fork of this process, so that the libraries are imported once. It dies right after it
has written the named event of that step, or with ["save", n] at the n-th fsync or rename.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trainer.training.loop  # noqa: F401  (imported before the forks)
from trainer.runs import events
from trainer.training.runner import run_in

Kill = tuple[str, int] | list[Any]
"""An event's name and its step, or "save" and a number of calls."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(kind: str, number: int) -> None:
    """Makes this process kill itself at an event or, with "save", in the middle of writing."""
    if kind == "save":
        count = CallCount(number)
        for name in ("fsync", "replace"):
            setattr(os, name, count.before(getattr(os, name)))
        return
    append = events.EventLog.append

    def append_and_die(self, event):
        append(self, event)
        if type(event).__name__ == kind and getattr(event, "step", number) == number:
            die()

    events.EventLog.append = append_and_die


class CallCount:
    """Counts the calls of several functions, and kills the process before the last one."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.calls = 0

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            self.calls += 1
            if self.calls == self.limit:
                die()
            return function(*arguments)

        return counted


def live(folder: Path, kill: Kill | None) -> int:
    """Runs a trainer until it finishes or is killed. Returns its wait status."""
    child = os.fork()
    if child == 0:
        if kill:
            arm(*kill)
        os._exit(run_in(folder))
    return os.waitpid(child, 0)[1]


def main(job: Path) -> None:
    for run in json.loads(job.read_text())["runs"]:
        folder = Path(run["folder"])
        for kill in run["kills"]:
            status = live(folder, kill)
            was_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            assert was_killed, f"not killed at {kill}: {status}"
        assert live(folder, None) == 0, run


if __name__ == "__main__":
    main(Path(sys.argv[1]))

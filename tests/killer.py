"""Trains runs that are killed with SIGKILL at chosen events, and resumed until they finish.

`python tests/killer.py JOB.json`: {"runs": [{"folder": ..., "kills": [["StepDone", 3], ["StateSaved", 4]]}, ...]}. Each life of a
trainer is a fork of this process, so that the libraries are read once; it dies right after the named
event of that step was written, or ("save", n) at the n-th fsync or rename, in the midst of a save.
"""

import json
import os
import signal
import sys
from pathlib import Path

import trainer.training.loop  # noqa: F401  (before the forks)
from trainer.runs import events
from trainer.training.runner import run_in


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(kind: str, number: int) -> None:
    """Lays the trap in this process."""
    if kind == "save":
        for name in ("fsync", "replace"):
            setattr(os, name, counting(getattr(os, name), number))
        return
    append = events.EventLog.append

    def append_and_die(self, event):
        append(self, event)
        if type(event).__name__ == kind and getattr(event, "step", number) == number:
            die()

    events.EventLog.append = append_and_die


calls = 0


def counting(function, limit: int):
    def counted(*arguments):
        global calls
        calls += 1
        if calls == limit:
            die()
        return function(*arguments)

    return counted


def live(folder: Path, kill: list | None) -> int:
    """One life of a trainer; returns its wait status."""
    child = os.fork()
    if child == 0:
        if kill:
            arm(*kill)
        os._exit(run_in(folder))
    return os.waitpid(child, 0)[1]


def main(job: Path) -> None:
    for run in json.loads(job.read_text())["runs"]:
        for kill in run["kills"]:
            status = live(Path(run["folder"]), kill)
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (
                f"not killed at {kill}: {status}"
            )
        assert live(Path(run["folder"]), None) == 0, run


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Requests to a trainer or to the queue: files whose presence is the message."""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from trainer.runs.atomic_files import atomic_write
from trainer.runs.run_folder import any_order


def request(folder: Path, what: str) -> None:
    """Asks the trainer for "stop", "pause", "save" or "sample", or the page for "queued"."""
    atomic_write(folder / what, f"{time.time_ns()}\n")


def withdraw(folder: Path, what: str) -> None:
    (folder / what).unlink(missing_ok=True)


def take(folder: Path, what: str) -> bool:
    """Whether something was asked for; the request is used up."""
    try:
        (folder / what).unlink()
    except FileNotFoundError:
        return False
    return True


def requested(folder: Path, what: str) -> bool:
    return (folder / what).exists()


def queue(parent: Path | None = None) -> Sequence[Path]:
    """Runs that wait for the device, in the order in which they were asked for."""
    waiting: dict[Path, str] = {}
    for folder in any_order(parent):
        with suppress(OSError):  # it waits for nothing, or no longer
            waiting[folder] = (folder / "queued").read_text().strip()
    return sorted(waiting, key=lambda folder: waiting[folder])

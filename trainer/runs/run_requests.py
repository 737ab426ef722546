"""Requests to a run: files in its folder whose presence is the message.

The trainer reads "stop", "pause", "save" and "sample"; the page reads "queued".
"""

import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

from trainer.runs.atomic_files import atomic_write
from trainer.runs.run_folder import unsorted_runs

Request = Literal["queued", "stop", "pause", "save", "sample"]


def request(folder: Path, name: Request) -> None:
    """Requests something of a run. The file contains the time, which orders the queue."""
    atomic_write(folder / name, f"{time.time_ns()}\n")


def withdraw(folder: Path, name: Request) -> None:
    """Removes a request, if it is there."""
    (folder / name).unlink(missing_ok=True)


def take(folder: Path, name: Request) -> bool:
    """Removes a request and returns whether it was there."""
    try:
        (folder / name).unlink()
    except FileNotFoundError:
        return False
    return True


def requested(folder: Path, name: Request) -> bool:
    """Whether a request is there. It stays."""
    return (folder / name).exists()


def queue(parent: Path | None = None) -> list[Path]:
    """Returns the runs that wait for the device, in the order in which they were queued."""
    queued_at: dict[Path, str] = {}
    for folder in unsorted_runs(parent):
        # Most runs are not queued, and a request can be withdrawn at any moment.
        with suppress(OSError):
            queued_at[folder] = (folder / "queued").read_text().strip()
    return sorted(queued_at, key=lambda folder: queued_at[folder])

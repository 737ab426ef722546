"""Locks: which process trains a run, and which run has the device."""

import os
from pathlib import Path

from filelock import FileLock, Timeout

from trainer.errors import StateError
from trainer.runs import events
from trainer.runs.run_folder import USERS, outputs_folder, slug


def lock(folder: Path) -> FileLock:
    """Held by the trainer for its whole life."""
    return FileLock(folder / ".lock", mode=0o644)


def acquire(folder: Path) -> FileLock:
    """Takes the run for this process. Raises StateError when another trainer has it."""
    taken = lock(folder)
    try:
        taken.acquire(
            timeout=1
        )  # the page tries the lock for a moment to see whether the run is alive
    except Timeout:
        owner = next(
            (
                e.pid
                for e in reversed(list(events.read_events(folder / "events.jsonl")))
                if isinstance(e, events.Launched)
            ),
            "?",
        )
        raise StateError(
            f"The run {folder.name} is already being trained by process {owner}; wait for it or stop it first."
        ) from None
    except OSError as error:
        raise StateError(
            f"The run folder {folder} cannot be written to: {error.strerror}."
        ) from None
    return taken


def device_lock() -> FileLock:
    """Held by the trainer that has the device; others wait. One for all that train below the same outputs folder.

    $ATELIER_SLOT names the device where a cluster has many behind one outputs folder, and gives each to one run itself.
    """
    root = outputs_folder()
    root = root.parents[1] if root.parent.name == USERS else root
    root.mkdir(parents=True, exist_ok=True)
    slot = os.environ.get("ATELIER_SLOT", "")
    return FileLock(root / (f".device-{slug(slot)}.lock" if slot else ".device.lock"), mode=0o644)


def boot_id() -> str:
    """Tells one start of the machine from another; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def is_alive(folder: Path) -> bool:
    """Whether a trainer process holds the run now."""
    if not (folder / ".lock").exists():
        return False
    probe = lock(folder)
    try:
        probe.acquire(timeout=0)
    except Timeout:
        return True
    probe.release()
    return False

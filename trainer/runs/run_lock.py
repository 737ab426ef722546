"""Locks of a run and of the device.

A run is alive while its trainer holds the lock of its folder. The operating system releases a
lock however the process ends.
"""

import os
from pathlib import Path

from filelock import FileLock, Timeout

from trainer.errors import StateError
from trainer.runs import events
from trainer.runs.run_folder import USERS_FOLDER, outputs_folder, slug

READABLE_BY_ALL = 0o644


def lock(folder: Path) -> FileLock:
    """Returns the lock of a run, which its trainer holds for as long as it runs."""
    return FileLock(folder / ".lock", mode=READABLE_BY_ALL)


def acquire(folder: Path) -> FileLock:
    """Locks the run for this process and returns the lock.

    Raises StateError if another trainer holds it, or if the folder cannot be written.
    """
    acquired = lock(folder)
    try:
        # Not 0: `is_alive`, called by the page, takes the lock for a moment.
        acquired.acquire(timeout=1)
    except Timeout:
        raise StateError(
            f"Process {_last_trainer(folder)} is already training the run {folder.name}. "
            "Wait for it, or stop it first."
        ) from None
    except OSError as error:
        raise StateError(f"Cannot write to the run folder {folder}: {error.strerror}.") from None
    return acquired


def _last_trainer(folder: Path) -> str:
    """Returns the id of the process that started last, or "?" if there is none."""
    pid = "?"
    for event in events.read_events(folder / "events.jsonl"):
        if isinstance(event, events.Launched):
            pid = str(event.pid)
    return pid


def device_lock() -> FileLock:
    """Returns the lock of the device, which one trainer holds while the others wait.

    All runs below the same outputs root share it, whichever user they belong to. On a cluster,
    $ATELIER_SLOT names the device, and each device has a separate lock.
    """
    root = outputs_folder()
    if root.parent.name == USERS_FOLDER:
        root = root.parents[1]
    root.mkdir(parents=True, exist_ok=True)
    slot = os.environ.get("ATELIER_SLOT", "")
    name = f".device-{slug(slot)}.lock" if slot else ".device.lock"
    return FileLock(root / name, mode=READABLE_BY_ALL)


def boot_id() -> str:
    """Returns an id that changes when the machine restarts, or "" if the system has none."""
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

"""Deletes what can be deleted at any time: caches above a limit, old uploads, unfinished files.

Datasets, runs and removed images (`cache/removed`) belong to the user and are never touched.
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from trainer.runs.atomic_files import WRITING
from trainer.runs.run_folder import outputs_folder

NOT_CACHES = ("removed", "uploads")
"""Folders below `cache` that are not caches: removed images, and uploads (`clean_uploads`)."""
UNFINISHED_AGE = 3600.0
"""Seconds after which an upload or an unfinished file counts as abandoned."""
DEFAULT_LIMIT_GB = 20.0


class CacheEntry(NamedTuple):
    """A cached file. Entries sort by their last use."""

    used_at: float
    """Seconds since 1970."""
    size: int
    path: Path


def cache_folder() -> Path:
    """Returns the folder of the caches: latents, embeddings, thumbnails and previews."""
    return outputs_folder() / "cache"


def limit() -> float:
    """Returns the maximum size of the caches in bytes, from $ATELIER_CACHE_GB."""
    try:
        return float(os.environ.get("ATELIER_CACHE_GB", DEFAULT_LIMIT_GB)) * 1e9
    except ValueError:
        return DEFAULT_LIMIT_GB * 1e9


def touch(path: Path) -> None:
    """Records the use of a cached file. Its modification time stays: keys depend on it."""
    with suppress(OSError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def _entries() -> Iterator[CacheEntry]:
    for folder, subfolders, files in os.walk(cache_folder()):
        if Path(folder) == cache_folder():
            subfolders[:] = [name for name in subfolders if name not in NOT_CACHES]
        for name in files:
            path = Path(folder, name)
            # Another process may delete the file at the same time.
            with suppress(OSError):
                stat = path.stat()
                yield CacheEntry(max(stat.st_atime, stat.st_mtime), stat.st_size, path)


def size() -> int:
    """Returns the size of the caches in bytes."""
    return sum(entry.size for entry in _entries())


def prune(max_bytes: float | None = None) -> int:
    """Deletes the least recently used files until the caches fit; returns the bytes freed.

    `max_bytes` defaults to `limit()`.
    """
    if max_bytes is None:
        max_bytes = limit()
    entries = sorted(_entries())
    left = sum(entry.size for entry in entries)
    freed = 0
    for entry in entries:
        if left <= max_bytes:
            break
        is_young = time.time() - entry.used_at < UNFINISHED_AGE
        if entry.path.name.startswith(WRITING) and is_young:
            continue  # Another process is writing this file.
        with suppress(OSError):
            entry.path.unlink()
            left -= entry.size
            freed += entry.size
    return freed


def clear() -> int:
    """Deletes all caches and returns the bytes freed. They are filled again when needed."""
    return prune(0)


def clean_uploads(older_than: float = UNFINISHED_AGE) -> None:
    """Deletes uploads that no dataset uses and the folders of killed imports.

    `older_than` is in seconds: an upload that is younger may still be arriving.
    """
    uploads = cache_folder() / "uploads"
    if not uploads.is_dir():
        return
    for path in uploads.iterdir():
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > older_than:
                _delete(path)


def clean_half_written(folder: Path) -> None:
    """Deletes the unfinished files and checkpoints that a killed trainer left in a run folder."""
    for parent in (folder, folder / "state", folder / "samples"):
        for path in parent.glob(f"{WRITING}*"):
            with suppress(OSError):
                _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()

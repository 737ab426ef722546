"""What may be deleted at any time: caches up to a limit, and what uploads and killed processes leave behind.

Nothing here is the person's work: datasets, runs and pictures that were taken out (`cache/removed`) are never touched.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from trainer.runs.atomic_files import WRITING
from trainer.runs.run_folder import outputs_folder

KEPT = (
    "removed",
    "uploads",
)  # below `cache`: the first is the person's, the second has its own rule
UPLOAD_AGE = 3600.0  # seconds; a drop that is still arriving is younger
DEFAULT_LIMIT = 20  # gigabytes; $ATELIER_CACHE_GB


def cache_folder() -> Path:
    return outputs_folder() / "cache"


def limit() -> float:
    """How large the caches may be, in bytes."""
    try:
        return float(os.environ.get("ATELIER_CACHE_GB", DEFAULT_LIMIT)) * 1e9
    except ValueError:
        return DEFAULT_LIMIT * 1e9


def touch(path: Path) -> None:
    """Notes that an entry was used. The time of its last change stays, by which it is known."""
    with contextlib.suppress(OSError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def _entries() -> Iterator[tuple[float, int, Path]]:
    """(last use, bytes, file) of latents, captions, thumbnails and previews."""
    for folder, names, files in os.walk(cache_folder()):
        if Path(folder) == cache_folder():
            names[:] = [name for name in names if name not in KEPT]
        for name in files:
            with contextlib.suppress(OSError):  # gone meanwhile
                stat = os.stat(os.path.join(folder, name))
                yield max(stat.st_atime, stat.st_mtime), stat.st_size, Path(folder, name)


def size() -> int:
    """Bytes of the caches."""
    return sum(count for _, count, _ in _entries())


def prune(most: float | None = None) -> int:
    """Deletes what was not used for longest until the caches fit their limit; returns the bytes freed."""
    most, found = limit() if most is None else most, sorted(_entries())
    total, freed = sum(count for _, count, _ in found), 0
    for used, count, path in found:
        if total - freed <= most:
            break
        if path.name.startswith(WRITING) and time.time() - used < 3600:
            continue  # somebody is at it
        with contextlib.suppress(OSError):
            path.unlink()
            freed += count
    return freed


def clear() -> int:
    """Deletes all caches; they are made anew when they are needed. Returns the bytes freed."""
    return prune(0)


def clean_uploads(older_than: float = UPLOAD_AGE) -> None:
    """Deletes uploads that no dataset took, and the work folders of imports that were killed."""
    uploads = cache_folder() / "uploads"
    for path in uploads.iterdir() if uploads.is_dir() else ():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > older_than:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def clean_half_written(folder: Path) -> None:
    """Deletes what a killed trainer left of files and states it was writing."""
    for place in (folder, folder / "state", folder / "samples"):
        for path in place.glob(f"{WRITING}*"):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

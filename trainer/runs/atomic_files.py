"""Files that are either whole or not there: every file of a run is written through here."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import disk_usage, rmtree
from tempfile import mkdtemp, mkstemp

from trainer.errors import DiskError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WRITING = ".writing-"  # how the names of files and folders begin that are not whole yet
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


def check_room(folder: Path, needed: float, what: str) -> None:
    """Raises DiskError where the disk of a folder (which may not exist yet) has fewer bytes free than needed."""
    free = disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    if free < needed:
        raise DiskError(
            f"The disk is full: {what} needs {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free in {folder}. "
            "Make room and try again; everything before is kept."
        )


@contextmanager
def _said(path: Path, needed: int) -> Iterator[None]:
    """A full or read-only disk as a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            free = disk_usage(path.parent).free
            raise DiskError(
                f"The disk is full ({error.strerror}): {path.name} needs {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free. "
                "Make room and try again; everything before is kept."
            ) from error
        if error.errno in READ_ONLY:
            raise DiskError(
                f"The folder {path.parent} cannot be written ({error.strerror}). "
                "Give permission or choose another folder with $ATELIER_OUTPUTS; everything before is kept."
            ) from error
        raise


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable. Windows cannot open a folder and needs no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask_mode(mode: int) -> int:
    umask = os.umask(0)
    os.umask(umask)
    return mode & ~umask


def atomic_write(path: Path, content: bytes | str) -> None:
    """Writes a file so that a reader, a kill or a power cut sees the old content or the new one, never a part."""
    content = content.encode("utf-8") if isinstance(content, str) else content
    with _said(path, len(content)):
        _replace(path, content)


def _replace(path: Path, content: bytes) -> None:
    descriptor, temporary = mkstemp(prefix=WRITING, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _umask_mode(0o666))  # mkstemp makes files only the owner can read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that gets its final name, complete and durable, when the block ends without an error."""
    with _said(path, 0), _new_folder(path) as temporary:
        yield temporary


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    temporary = Path(mkdtemp(prefix=WRITING, dir=path.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_dir():
                sync_folder(file)
                continue
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
        sync_folder(temporary)
        if path.exists():
            rmtree(path)
        os.replace(temporary, path)
    except BaseException:
        rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)

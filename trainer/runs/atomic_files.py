"""Files and folders that appear whole or not at all. Every file of a run is written here."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import disk_usage, rmtree
from tempfile import mkdtemp, mkstemp

from trainer.errors import DiskError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
WRITING = ".writing-"
"""Prefix of files and folders that are not complete yet."""


def check_room(folder: Path, needed: float, content: str) -> None:
    """Raises DiskError if the disk of a folder has fewer free bytes than needed.

    The folder need not exist yet. `content` names what needs the room, such as "the run".
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = disk_usage(existing).free
    if free < needed:
        raise DiskError(
            f"The disk is full: {content} needs {_megabytes(needed)}, and {_megabytes(free)} are "
            f"free in {folder}. Make room and try again; existing files are kept."
        )


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


@contextmanager
def _disk_errors(path: Path, needed: int) -> Iterator[None]:
    """Turns the OSError of a full or read-only disk into a DiskError."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            free = disk_usage(path.parent).free
            raise DiskError(
                f"The disk is full ({error.strerror}): {path.name} needs {_megabytes(needed)}, "
                f"and {_megabytes(free)} are free. "
                "Make room and try again; existing files are kept."
            ) from error
        if error.errno in READ_ONLY:
            raise DiskError(
                f"Cannot write to the folder {path.parent} ({error.strerror}). Grant permission, "
                "or choose another folder with $ATELIER_OUTPUTS; existing files are kept."
            ) from error
        raise


def sync_folder(folder: Path) -> None:
    """Makes the file names in a folder durable. Windows needs no such call, and refuses it."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _apply_umask(mode: int) -> int:
    # The umask can only be read by setting it.
    umask = os.umask(0)
    os.umask(umask)
    return mode & ~umask


def atomic_write(path: Path, content: bytes | str) -> None:
    """Writes a file that readers see either as it was or complete, also after a power cut.

    Raises DiskError if the disk is full or read-only.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    with _disk_errors(path, len(data)):
        _replace_file(path, data)


def _replace_file(path: Path, content: bytes) -> None:
    descriptor, temporary = mkstemp(prefix=WRITING, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp creates files that only their owner can read.
        os.chmod(temporary, _apply_umask(0o666))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder, which replaces `path` if the block ends without an error.

    Raises DiskError if the disk is full or read-only.
    """
    with _disk_errors(path, 0), _replace_folder(path) as temporary:
        yield temporary


@contextmanager
def _replace_folder(path: Path) -> Iterator[Path]:
    temporary = Path(mkdtemp(prefix=WRITING, dir=path.parent))
    try:
        yield temporary
        _sync_contents(temporary)
        if path.exists():
            rmtree(path)
        os.replace(temporary, path)
    except BaseException:
        rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def _sync_contents(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
            continue
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    sync_folder(folder)

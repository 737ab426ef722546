"""Files that are either whole or not there: every file of a run is written through here."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp, mkstemp


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
    descriptor, temporary = mkstemp(prefix=".writing-", dir=path.parent)
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
    temporary = Path(mkdtemp(prefix=".writing-", dir=path.parent))
    try:
        yield temporary
        for file in temporary.iterdir():
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

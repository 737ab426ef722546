"""Unpacks a zip from an untrusted source. All of it is checked before any of it is imported."""

import errno
import itertools
import lzma
import mmap
import os
import re
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from trainer.curation.import_names import (
    MAX_DEPTH,
    TOO_DEEP,
    SourceFile,
    kind_of,
    why_not_imported,
)
from trainer.data.dataset_files import JUNK_NAMES
from trainer.data.image_formats import MAX_FILE_BYTES
from trainer.data.issue import Issue, printable
from trainer.errors import DatasetError

MAX_ENTRIES = 20_000  # files in one zip
MAX_TOTAL_BYTES = 20 * 2**30  # of one zip, unpacked
CHUNK_BYTES = 2**20
MAX_SHOWN_NAME = 80  # characters

_LOCAL_HEADER_BYTES = 30  # without the name
_CENTRAL_HEADER = b"PK\1\2"
_FLAG_ENCRYPTED, _FLAG_UTF8 = 0x1, 0x800

_ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError, RuntimeError,
    ValueError, LookupError,
)  # fmt: skip
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
"""The OSErrors that are not the zip's fault."""


# Unpacking


def unpack(source: Path, name: str, work: Path, issues: list[Issue]) -> list[SourceFile]:
    """Unpacks images, captions and metadata into the new folder `work`, with numbers for names.

    Adds an issue for each file that is not imported. Raises `DatasetError` if the whole zip is
    refused, and `OSError` if the disk is full.
    """
    zip_issues: list[Issue] = []
    work.mkdir()
    try:
        _refuse_crowded_zip(source)
        with zipfile.ZipFile(source) as archive:
            _refuse_bad_zip(archive)
            files = _unpack_all(archive, work, zip_issues)
    except (*_ZIP_ERRORS, DatasetError) as error:
        shutil.rmtree(work)
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise
        reason = str(error)
        if not isinstance(error, DatasetError):
            reason = f"is damaged ({printable(reason)[:160]}): create it again"
        message = f"{printable(name)} {reason}. Nothing in it was imported."
        raise DatasetError(message) from error
    issues += zip_issues
    return files


def _unpack_all(archive: zipfile.ZipFile, work: Path, issues: list[Issue]) -> list[SourceFile]:
    files = []
    total = 0
    entries = [info for info in archive.infolist() if not info.is_dir()]
    for number, info in enumerate(entries):
        parts = [part for part in _entry_name(info).split("/") if part not in ("", ".")]
        *folders, name = parts
        file = SourceFile(work / str(number), tuple(folders), name)
        is_wanted = _is_wanted(file, issues)
        # Unwanted entries are read too: this is how zipfile detects false sizes and damage.
        target = file.path if is_wanted else None
        total += _unpack_entry(archive, info, target, MAX_TOTAL_BYTES - total)
        if is_wanted:
            files.append(file)
    return files


def _is_wanted(file: SourceFile, issues: list[Issue]) -> bool:
    """Returns whether to import an entry. Adds an issue if not, except for junk."""
    if len(file.folders) > MAX_DEPTH:
        shortened = f"{printable('/'.join(file.folders[:3]))}/.../{printable(file.name)}"
        issues.append(Issue(shortened, "warning", TOO_DEEP))
        return False
    if JUNK_NAMES.intersection(map(str.lower, file.folders)):
        return False
    kind = kind_of(file.name)
    if kind == "other":
        issues.append(Issue(file.file, "warning", why_not_imported(file.name)))
    return kind in ("image", "caption", "metadata")


def _unpack_entry(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path | None, max_bytes: int
) -> int:
    """Unpacks one entry, to nowhere if `target` is None. Returns the real number of bytes."""
    size = 0
    with archive.open(info) as packed, open(target or os.devnull, "wb") as unpacked:
        while chunk := packed.read(CHUNK_BYTES):
            size += len(chunk)
            if size > min(MAX_FILE_BYTES, max_bytes):
                raise DatasetError(
                    f"is too large when unpacked ({printable(info.filename)}): import the images "
                    "themselves"
                )
            unpacked.write(chunk)
    if size != info.file_size:
        raise DatasetError(
            f"is damaged: {printable(info.filename)} does not have the size that it claims"
        )
    return size


def _entry_name(info: zipfile.ZipInfo) -> str:
    """Returns the intended name of an entry.

    Some programs write UTF-8 without setting the flag, and zipfile reads it as code page 437.
    """
    if info.flag_bits & _FLAG_UTF8:
        return info.orig_filename
    try:
        return info.orig_filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return info.orig_filename


# Refusals


def _refuse_crowded_zip(source: Path) -> None:
    """Counts the entries before zipfile creates an object for each.

    A million objects take seconds and more than half a gigabyte.
    """
    if source.stat().st_size == 0:
        raise DatasetError("is empty (0 bytes): copy it again from its source")
    with open(source, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        # The iterator must be gone when the map closes, so it has no name.
        entries = sum(
            1 for _ in itertools.islice(re.finditer(_CENTRAL_HEADER, data), MAX_ENTRIES + 1)
        )
    if entries > MAX_ENTRIES:
        raise DatasetError(f"contains more than {MAX_ENTRIES} files, the limit: split it")


def _refuse_bad_zip(archive: zipfile.ZipFile) -> None:
    """Refuses what zipfile would silently rewrite or unpack: bombs, overlaps, paths and links."""
    infos = archive.infolist()
    _refuse_size(infos)
    _refuse_overlap(infos, archive.start_dir)
    for info in infos:
        _refuse_entry(info)
    _refuse_clash(infos)


def _refuse_size(infos: list[zipfile.ZipInfo]) -> None:
    total = sum(info.file_size for info in infos)
    largest = max((info.file_size for info in infos), default=0)
    if total > MAX_TOTAL_BYTES or largest > MAX_FILE_BYTES:
        limits = f"{MAX_FILE_BYTES >> 20} MB per file and {MAX_TOTAL_BYTES >> 30} GB in total"
        raise DatasetError(
            f"is too large when unpacked (the limit is {limits}): import the images themselves"
        )


def _refuse_overlap(infos: list[zipfile.ZipInfo], end: int) -> None:
    """Raises `DatasetError` if entries share bytes. `end` is the start of the central directory."""
    for info in sorted(infos, key=lambda info: info.header_offset, reverse=True):
        encoding = "utf-8" if info.flag_bits & _FLAG_UTF8 else "cp437"
        name_bytes = len(info.orig_filename.encode(encoding, "replace"))
        min_bytes = _LOCAL_HEADER_BYTES + name_bytes + info.compress_size
        if info.header_offset + min_bytes > end:
            raise DatasetError("is not a valid zip, because its files overlap: create it again")
        end = info.header_offset


def _refuse_entry(info: zipfile.ZipInfo) -> None:
    name = _entry_name(info)
    shown_name = printable(name)[:MAX_SHOWN_NAME]
    leads_outside = name.startswith("/") or ".." in name.split("/") or re.match("[A-Za-z]:", name)
    if leads_outside or "\\" in name or "\0" in name:
        raise DatasetError(
            f"contains a name that leads out of its folder ({shown_name}): create it again"
        )
    if info.flag_bits & _FLAG_ENCRYPTED:
        raise DatasetError("is encrypted: create it again without a password")
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise DatasetError(
            f"contains a link or a device ({shown_name}): create it again with the files themselves"
        )


def _refuse_clash(infos: list[zipfile.ZipInfo]) -> None:
    """Raises `DatasetError` if a name is both a file and a folder."""
    files: set[str] = set()
    folders: set[str] = set()
    for info in infos:
        name = _entry_name(info)
        (folders if info.is_dir() else files).add(name.rstrip("/"))
        folders.update(_parents(name))
    clashes = sorted(files & folders)
    if clashes:
        raise DatasetError(
            f"contains {printable(clashes[0])} both as a file and as a folder: create it again"
        )


def _parents(name: str) -> Iterator[str]:
    """Yields the folders of a name, as far as files are imported from them."""
    parts = name.split("/")
    for depth in range(1, min(len(parts), MAX_DEPTH + 2)):
        yield "/".join(parts[:depth])

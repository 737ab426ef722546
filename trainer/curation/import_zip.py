"""Unpacking a zip that a stranger made: all of it is checked before any of it is kept."""

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
from pathlib import Path

from trainer.curation.import_names import MAX_DEPTH, TOO_DEEP, SourceFile, kind_of, why_not_imported
from trainer.data.dataset_files import JUNK_NAMES
from trainer.data.image_formats import MAX_FILE_BYTES
from trainer.data.issues import Issue, shown
from trainer.errors import DatasetError

MAX_ENTRIES = 20_000  # files in one zip
MAX_TOTAL_BYTES = 20 * 2**30  # of one zip, unpacked
_ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError, RuntimeError, ValueError,
    LookupError,
)  # fmt: skip
_DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EFBIG,
)  # other OSErrors are the fault of the zip


def unpack(source: Path, name: str, work: Path, findings: list[Issue]) -> list[SourceFile]:
    """Unpack what is wanted into `work`, with numbers for names. Raises `DatasetError` when all of it is refused."""
    about: list[Issue] = []
    dropped: list[SourceFile] = []
    work.mkdir()
    try:
        _refuse_crowded_zip(source)
        with zipfile.ZipFile(source) as archive:
            _refuse_bad_zip(archive)
            total = 0
            for number, info in enumerate(info for info in archive.infolist() if not info.is_dir()):
                *folders, entry_name = [
                    part for part in _entry_name(info).split("/") if part not in ("", ".")
                ]
                entry = SourceFile(work / str(number), tuple(folders), entry_name)
                kind = (
                    "junk"
                    if JUNK_NAMES.intersection(map(str.lower, folders))
                    else kind_of(entry_name)
                )
                if len(folders) > MAX_DEPTH:
                    kind = "deep"
                    label = f"{shown('/'.join(folders[:3]))}/.../{shown(entry_name)}"
                    about.append(Issue(label, "warning", TOO_DEEP))
                elif kind == "other":
                    about.append(Issue(entry.shown, "warning", why_not_imported(entry_name)))
                wanted = kind in ("picture", "caption", "metadata")
                total += _unpack_entry(
                    archive, info, entry.path if wanted else None, MAX_TOTAL_BYTES - total
                )
                if wanted:
                    dropped.append(entry)
    except (*_ZIP_ERRORS, DatasetError) as error:
        shutil.rmtree(work)
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise
        reason = (
            str(error)
            if isinstance(error, DatasetError)
            else f"is damaged ({shown(str(error))[:160]}): make it anew"
        )
        raise DatasetError(f"{shown(name)} {reason}. Nothing of it was imported.") from error
    findings += about
    return dropped


def _unpack_entry(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path | None, room: int
) -> int:
    """The number of bytes that really came out. Unwanted entries are read too: so zipfile finds lies and damage."""
    size = 0
    with archive.open(info) as packed, open(target or os.devnull, "wb") as unpacked:
        while chunk := packed.read(2**20):
            size += len(chunk)
            if size > min(MAX_FILE_BYTES, room):
                raise DatasetError(
                    f"is too large when unpacked ({shown(info.filename)}): drop the pictures themselves"
                )
            unpacked.write(chunk)
    if size != info.file_size:
        raise DatasetError(f"is damaged: {shown(info.filename)} has not the size it claims")
    return size


def _entry_name(info: zipfile.ZipInfo) -> str:
    """The name as it was meant: some programs write UTF-8 without saying so, which zipfile reads as code page 437."""
    if info.flag_bits & 0x800:
        return info.orig_filename
    try:
        return info.orig_filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return info.orig_filename


def _refuse_crowded_zip(source: Path) -> None:
    """Count the entries before zipfile makes an object of each: a million take seconds and more than half a gigabyte."""
    if source.stat().st_size == 0:
        raise DatasetError("is empty (0 bytes): copy it again from where it came")
    with open(source, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if (
            sum(1 for _ in itertools.islice(re.finditer(b"PK\1\2", data), MAX_ENTRIES + 1))
            > MAX_ENTRIES
        ):
            raise DatasetError(f"holds more than {MAX_ENTRIES} files, the limit: split it")


def _refuse_bad_zip(archive: zipfile.ZipFile) -> None:
    """What zipfile would rewrite or unpack without a word: names that leave the folder, links, overlaps, bombs."""
    infos = archive.infolist()
    if sum(info.file_size for info in infos) > MAX_TOTAL_BYTES or any(
        info.file_size > MAX_FILE_BYTES for info in infos
    ):
        limits = f"{MAX_FILE_BYTES >> 20} MB a file and {MAX_TOTAL_BYTES >> 30} GB in all"
        raise DatasetError(
            f"is too large when unpacked (the limit is {limits}): drop the pictures themselves"
        )
    end = archive.start_dir
    for info in sorted(infos, key=lambda info: info.header_offset, reverse=True):
        smallest = 30 + len(
            info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437", "replace")
        )
        if info.header_offset + smallest + info.compress_size > end:
            raise DatasetError("is not an honest zip: its files overlap; make it anew")
        end = info.header_offset
    files: set[str] = set()
    folders: set[str] = set()
    for info in infos:
        name = _entry_name(info)
        parts = name.split("/")
        if (
            "\\" in name
            or "\0" in name
            or name.startswith("/")
            or ".." in parts
            or re.match(r"[A-Za-z]:", name)
        ):
            raise DatasetError(
                f"holds a name that leads out of its folder ({shown(name)[:80]}): make it anew"
            )
        if info.flag_bits & 0x1:
            raise DatasetError("is encrypted: make it anew without a password")
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise DatasetError(
                f"holds a link or a device ({shown(name)[:80]}): make it anew with the files themselves"
            )
        (folders if info.is_dir() else files).add(name.rstrip("/"))
        folders.update(
            "/".join(parts[:depth]) for depth in range(1, min(len(parts), MAX_DEPTH + 2))
        )
    if clash := sorted(files & folders):
        raise DatasetError(f"holds {shown(clash[0])} both as a file and as a folder: make it anew")

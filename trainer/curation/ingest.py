"""Dropped files, folders and zips become part of a dataset folder: copied, never altered, never overwriting.

Nothing is written outside that folder, no name is taken as it came, and only readable pictures and captions are kept.
"""

import contextlib
import errno
import hashlib
import itertools
import lzma
import mmap
import os
import re
import shutil
import stat
import struct
import tempfile
import unicodedata
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.data.captions import (
    MAX_CAPTION_BYTES,
    METADATA_NAME,
    caption_path,
    read_metadata,
    relative,
    suffix_of,
)
from trainer.data.image_stats import check_image
from trainer.data.images import IMAGE_SUFFIXES, MAX_FILE_BYTES, read_image, shown
from trainer.data.issues import Issue, Level
from trainer.data.scan import JUNK_NAMES, MASK_ENDINGS, MASK_FOLDER, is_junk
from trainer.errors import DatasetError
from trainer.runs.atomic_files import atomic_write

MAX_ENTRIES = 20_000  # files in one zip
MAX_TOTAL_BYTES = 20 * 2**30  # of one zip, unpacked
MAX_DEPTH = 16  # folders within folders
MAX_NAME_BYTES = (
    120  # leaves room for a suffix where 255 bytes are the limit, and for deep folders on Windows
)

_CAPTION_ENDS = (".txt", ".caption")
_TOO_DEEP = f"Lies deeper than {MAX_DEPTH} folders: it was not imported."
_RESERVED = re.compile(
    r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE
)  # devices on Windows, whatever the extension
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


@dataclass
class _Dropped:
    """A file to import: where it lies now, and the folders and name it came under, in one spelling of their accents."""

    path: Path
    folders: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        self.folders, self.name = tuple(map(_composed, self.folders)), _composed(self.name)

    @property
    def shown(self) -> str:
        return shown("/".join((*self.folders, self.name)))


def import_files(sources: Iterable[Path | tuple[Path, str]], dataset_dir: Path) -> list[Issue]:
    """Copy pictures and captions out of files, folders and zips into `dataset_dir`; say what was left out or renamed.

    A dropped folder keeps its name and structure, a zip its structure. A source may come with the name, or relative
    path, the person knows it by; one file may come under several.
    Captions in a `metadata.jsonl` are saved as `<picture>.txt`. A bad zip is one finding and none of it is imported.
    Raises `DatasetError` when `dataset_dir` cannot be written.
    """
    dataset_dir = Path(dataset_dir)
    findings: list[Issue] = []
    try:
        dataset_dir.mkdir(parents=True, exist_ok=True)
        # Hidden, so that a scan passes over what a killed import leaves; inside, as nothing outside is ours to write.
        with tempfile.TemporaryDirectory(prefix=".importing-", dir=dataset_dir) as work:
            dropped = []
            for number, source in enumerate(sources):
                path, name = source if isinstance(source, tuple) else (source, source.name)
                dropped += _collect(path, name, Path(work, str(number)), findings)
            _Import(dataset_dir, findings).place(dropped)
    except OSError as error:
        raise DatasetError(
            f"{shown(dataset_dir)} cannot be written ({error.strerror}): make room or choose another folder."
        ) from error
    return findings


def _kind(name: str) -> str:
    """ "picture", "caption", "metadata", "junk" or "other", told by the name alone."""
    if is_junk(name):
        return "junk"
    if name == METADATA_NAME:
        return "metadata"
    if suffix_of(name) in IMAGE_SUFFIXES:
        return "picture"
    return "caption" if suffix_of(name) in _CAPTION_ENDS else "other"


def _why_not_kept(name: str) -> str:
    if suffix_of(name) == ".zip":
        return "Is a zip inside what was dropped: it was not unpacked; drop it by itself."
    return f"Is neither a picture nor a caption ({suffix_of(name) or 'no extension'}): it was not kept."


# Collecting


def _collect(source: Path, name: str, work: Path, findings: list[Issue]) -> list[_Dropped]:
    try:
        if source.is_symlink():
            message = "Is a link, which is not followed: drop the file or folder itself."
            findings.append(Issue(shown(name), "warning", message))
        elif source.is_dir():
            return list(_walk(source, name.rstrip("/").rpartition("/")[2], findings))
        elif not source.exists():
            findings.append(Issue(shown(name), "error", "Is no longer there: drop it again."))
        elif not source.is_file():
            findings.append(
                Issue(
                    shown(name), "error", "Is a pipe or a device, not a file: it was not imported."
                )
            )
        elif suffix_of(name) == ".zip" and "/" not in name:
            return _unpack(source, name, work, findings)
        else:
            *folders, file_name = [
                part for part in name.split("/") if part not in ("", ".", "..")
            ] or ["picture"]
            return _file_of_folder(_Dropped(source, tuple(folders), file_name), findings)
    except DatasetError as error:
        findings.append(Issue(shown(name), "error", str(error)))
    return []


def _file_of_folder(entry: _Dropped, findings: list[Issue]) -> list[_Dropped]:
    """A file that came with its folders, or nothing where `_walk` would not have gone into them."""
    if any(map(is_junk, entry.folders)):
        return []
    if any(folder.startswith(".") for folder in entry.folders):
        findings.append(Issue(entry.shown, "note", "Lies in a hidden folder: it was not imported."))
        return []
    if len(entry.folders) > MAX_DEPTH:
        findings.append(Issue(entry.shown, "warning", _TOO_DEEP))
        return []
    return [entry]


def _walk(source: Path, name: str, findings: list[Issue]) -> Iterator[_Dropped]:
    waiting: list[tuple[Path, tuple[str, ...]]] = [(source, (name,))]
    while waiting:
        parent, folders = waiting.pop()
        try:
            entries = sorted(os.scandir(parent), key=lambda entry: entry.name)
        except OSError as error:
            findings.append(
                Issue(
                    shown("/".join(folders)),
                    "error",
                    f"The folder cannot be read: {error.strerror}.",
                )
            )
            continue
        for entry in entries:
            label = shown("/".join((*folders, entry.name)))
            if is_junk(entry.name):
                continue
            if entry.is_symlink():
                findings.append(
                    Issue(
                        label, "warning", "Is a link, which is not followed: copy the file itself."
                    )
                )
            elif entry.is_dir() and entry.name.startswith("."):
                findings.append(Issue(label, "note", "Is a hidden folder: it was not imported."))
            elif entry.is_dir() and len(folders) >= MAX_DEPTH:
                findings.append(Issue(label, "warning", _TOO_DEEP))
            elif entry.is_dir():
                waiting.append((parent / entry.name, (*folders, entry.name)))
            else:
                yield _Dropped(parent / entry.name, folders, entry.name)


def _unpack(source: Path, name: str, work: Path, findings: list[Issue]) -> list[_Dropped]:
    """Unpack what is wanted into `work`, with numbers for names. Raises `DatasetError` when all of it is refused."""
    about: list[Issue] = []
    dropped: list[_Dropped] = []
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
                entry = _Dropped(work / str(number), tuple(folders), entry_name)
                kind = (
                    "junk"
                    if JUNK_NAMES.intersection(map(str.lower, folders))
                    else _kind(entry_name)
                )
                if len(folders) > MAX_DEPTH:
                    kind = "deep"
                    label = f"{shown('/'.join(folders[:3]))}/.../{shown(entry_name)}"
                    about.append(Issue(label, "warning", _TOO_DEEP))
                elif kind == "other":
                    about.append(Issue(entry.shown, "warning", _why_not_kept(entry_name)))
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


# Placing


def safe_name(stem: str, room: int = MAX_NAME_BYTES) -> str:
    """`stem` as a name every file system takes: visible, without `<>:"/\\|?*`, at most `room` bytes of UTF-8.

    What is cut off becomes a hash, so that long names that differ only at their end still differ, and a caption that
    comes later finds its picture.
    """
    visible = "".join(
        c for c in stem if unicodedata.category(c) not in ("Cc", "Cf", "Zl", "Zp") or c == "\u200d"
    )
    visible = _composed(visible)
    visible = "".join(
        "_" if unicodedata.category(c) in ("Cs", "Cn") or c in '<>:"/\\|?*' else c for c in visible
    )
    visible = visible.strip(". ")
    if visible.startswith(("-", "~")) or _RESERVED.fullmatch(visible):
        visible = f"_{visible}"
    encoded = visible.encode()
    if len(encoded) > room:
        end = "-" + hashlib.sha256(encoded).hexdigest()[:8]
        visible = encoded[: room - len(end)].decode("utf-8", "ignore").rstrip(". ") + end
    return visible or "picture"


def _split(name: str) -> tuple[str, str]:
    """(stem, ending) such that a picture, its captions `a.txt` or `a.png.txt` and its mask `a.mask.png` have the same stem."""
    mask_ending = next((ending for ending in MASK_ENDINGS if name.lower().endswith(ending)), "")
    if mask_ending and len(name) > len(mask_ending):
        return name[: -len(mask_ending)], mask_ending
    ending = suffix_of(name)
    stem = name[: len(name) - len(ending)]
    if ending in _CAPTION_ENDS and suffix_of(stem) in IMAGE_SUFFIXES:
        inner = suffix_of(stem)
        return stem[: len(stem) - len(inner)], inner + ending
    return stem, ending


def _composed(text: str) -> str:
    """macOS writes an accent as a character of its own, most others write it with its letter, as here."""
    return unicodedata.normalize("NFC", text)


def _key(path: Path) -> str:
    """Equal for names that are one file on a disk that ignores capitals or the composition of accents."""
    return _composed(path.as_posix()).casefold()


def _beside(stem: Path, ending: str) -> Path:
    return stem.with_name(stem.name + ending)


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


class _Import:
    """One import into one folder: what is there, what has been taken, what is said."""

    def __init__(self, dataset_dir: Path, findings: list[Issue]):
        self.dataset_dir, self.findings = dataset_dir, findings
        self.taken: set[str] = set()
        self.used: set[str] = (
            set()
        )  # stems of pictures, and of all that this import saves: their captions are theirs
        self.of_size: defaultdict[int, list[Path]] = defaultdict(
            list
        )  # pictures that were there before
        self.already: dict[str, Path] = {}  # the same by sha256, of the sizes that were asked for
        for parent, folders, files in os.walk(dataset_dir):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for path in (Path(parent, name) for name in (*files, *folders)):
                self.taken.add(_key(path))
                stem, ending = _split(path.name)
                if suffix_of(path.name) in IMAGE_SUFFIXES and path.is_file():
                    self.of_size[path.stat().st_size].append(path)
                    if ending not in MASK_ENDINGS:
                        self.used.add(_key(path.with_name(stem)))

    def say(self, file: str, level: Level, message: str) -> None:
        self.findings.append(Issue(file, level, message))

    def place(self, dropped: list[_Dropped]) -> None:
        saved: dict[tuple[tuple[str, ...], str], Path] = {}
        for group in self._groups(dropped):
            self._place_group(group, saved)
        for entry in dropped:
            if _kind(entry.name) == "metadata":
                self._place_metadata(entry, saved)

    def _groups(self, dropped: list[_Dropped]) -> list[dict[str, _Dropped]]:
        """Pictures with their captions, ending -> file. A name that comes a second time begins a group of its own."""
        groups: dict[tuple[tuple[str, ...], str], list[dict[str, _Dropped]]] = {}
        beside = {
            (entry.folders, _split(entry.name)[0])
            for entry in dropped
            if _kind(entry.name) == "picture"
        }
        for entry in dropped:
            if _kind(entry.name) == "other":
                self.say(entry.shown, "warning", _why_not_kept(entry.name))
            if _kind(entry.name) not in ("picture", "caption"):
                continue
            folders, (stem, ending) = entry.folders, _split(entry.name)
            if (
                folders
                and folders[-1].lower() == MASK_FOLDER
                and ending == ".png"
                and (folders[:-1], stem) in beside
            ):
                folders, ending = (
                    folders[:-1],
                    MASK_ENDINGS[0],
                )  # masks/a.png: beside its picture it stays with it under any name
            same_stem = groups.setdefault((folders, stem), [])
            free = next((group for group in same_stem if ending not in group), None)
            if free is None:
                same_stem.append(free := {})
            free[ending] = entry
        return [group for same_stem in groups.values() for group in same_stem]

    def _place_group(
        self, group: dict[str, _Dropped], saved: dict[tuple[tuple[str, ...], str], Path]
    ) -> None:
        pictures = {ending: entry for ending, entry in group.items() if ending in IMAGE_SUFFIXES}
        contents: dict[str, bytes] = {}
        stem = None
        for ending, entry in pictures.items():
            try:
                data = read_image(entry.path)
                check_image(data, Path(entry.name))
            except DatasetError as error:
                self.say(entry.shown, "error", f"{error} It was not imported.")
                continue
            if twin := self._twin(data):
                self.say(
                    entry.shown,
                    "note",
                    f"Is already there as {shown(twin.name)}: it was not copied again.",
                )
                stem = caption_path(twin).with_suffix("")
                saved.setdefault((entry.folders, entry.name), twin)
            else:
                contents[ending] = data
        captions = {
            ending: entry for ending, entry in group.items() if ending not in IMAGE_SUFFIXES
        }
        masks = {ending: captions.pop(ending) for ending in MASK_ENDINGS if ending in captions}
        if pictures and not contents and stem is None:
            for what, companions in (("caption", captions), ("mask", masks)):
                for entry in companions.values():
                    self.say(
                        entry.shown,
                        "warning",
                        f"Its picture cannot be used: the {what} was not imported.",
                    )
            return
        for ending, entry in masks.items():
            try:
                contents[ending] = read_image(entry.path)
                check_image(contents[ending], Path(entry.name))
            except DatasetError as error:
                contents.pop(ending, None)
                self.say(entry.shown, "warning", f"{error} The mask was not imported.")
        for ending, entry in captions.items():
            if (text := self._caption_bytes(entry)) is not None:
                contents[ending] = text
        if not contents:
            return
        wanted = self._wanted(next(iter(group.values())))
        stem = (
            self._free_stem(wanted, contents)
            if stem is None or pictures.keys() & contents.keys()
            else stem
        )
        if not pictures:  # captions dropped after their pictures: another name would part them
            stem = wanted
        self._save_all(group, contents, stem, saved)

    def _twin(self, data: bytes) -> Path | None:
        """The same picture, where it was there before. Only those of its size are read, once."""
        for path in self.of_size.pop(len(data), []):
            with contextlib.suppress(
                FileNotFoundError
            ):  # an import may take minutes, and the person may tidy up meanwhile
                self.already[_sha256(path)] = path
        return self.already.get(hashlib.sha256(data).hexdigest())

    def _save_all(
        self, group: dict[str, _Dropped], contents: dict[str, bytes], stem: Path, saved: dict
    ) -> None:
        for ending, data in contents.items():
            entry, target = group[ending], _beside(stem, ending)
            if _key(target) in self.taken:
                if not _holds(target, data):
                    message = (
                        "There is another file of that name already: it was kept, this one was not."
                    )
                    self.say(entry.shown, "warning", message)
                continue
            if not target.parent.resolve().is_relative_to(self.dataset_dir.resolve()):
                self.say(
                    entry.shown,
                    "warning",
                    "Its folder is a link that leaves the dataset: it was not imported.",
                )
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(target, data)
            self.taken.add(_key(target))
            self.used.add(_key(stem))
            saved.setdefault((entry.folders, entry.name), target)
            if stem.relative_to(self.dataset_dir).as_posix() != "/".join(
                (*entry.folders, _split(entry.name)[0])
            ):
                self.say(entry.shown, "note", f"Was saved as {relative(target, self.dataset_dir)}.")

    def _caption_bytes(self, entry: _Dropped) -> bytes | None:
        try:
            data = read_image(entry.path)
        except DatasetError as error:
            self.say(entry.shown, "warning", f"{error} The caption was not imported.")
            return None
        if len(data) > MAX_CAPTION_BYTES:
            self.say(
                entry.shown,
                "warning",
                f"The caption is larger than {MAX_CAPTION_BYTES >> 20} MB: it was not imported.",
            )
            return None
        return data

    def _wanted(self, entry: _Dropped) -> Path:
        folder = self.dataset_dir.joinpath(*(safe_name(part) for part in entry.folders))
        return folder / safe_name(
            _split(entry.name)[0], MAX_NAME_BYTES - 20
        )  # room for "-123" and ".jpeg.caption"

    def _free_stem(self, wanted: Path, contents: Mapping[str, bytes]) -> Path:
        number, stem = 1, wanted
        while not self._is_free(stem, contents):
            number += 1
            stem = wanted.with_name(f"{wanted.name}-{number}")
        return stem

    def _is_free(self, stem: Path, contents: Mapping[str, bytes]) -> bool:
        """Whether nothing is in the way there. A caption from before that no picture has was waiting for this one."""
        in_the_way = [
            ending
            for ending in {*contents, *_CAPTION_ENDS}
            if _key(_beside(stem, ending)) in self.taken
        ]
        if _key(stem) in self.used:
            return not in_the_way
        return all(
            ending not in contents or _holds(_beside(stem, ending), contents[ending])
            for ending in in_the_way
        )

    def _place_metadata(
        self, entry: _Dropped, saved: dict[tuple[tuple[str, ...], str], Path]
    ) -> None:
        captions, bad = read_metadata(entry.path)
        if bad:
            self.say(entry.shown, "warning", bad)
        written = 0
        for name, caption in captions.items():
            *folders, file_name = _composed(name).split("/")
            picture = saved.get(((*entry.folders, *folders), file_name))
            if picture is None or not caption.strip():
                continue
            target = caption_path(picture)
            if _key(target) not in self.taken:
                atomic_write(target, caption.encode("utf-8", "replace"))
                self.taken.add(_key(target))
                written += 1
        self.say(
            entry.shown,
            "note",
            f"{written} of its {len(captions)} captions were saved as .txt files beside the pictures.",
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""A folder of pictures and captions, read: what is trained on, and one finding for everything that is odd or left out.

It never changes the folder, except `write_caption`, and never leaves anything out without naming it.
"""

import hashlib
import itertools
import json
import math
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .buckets import MAX_ASPECT
from .errors import DatasetError
from .files import atomic_write
from .pictures import PICTURE_SUFFIXES, SMALLEST_SIDE, decode_picture, read_picture, shown

CAPTION_SUFFIXES = (".txt", ".TXT", ".caption", ".CAPTION")  # in this order; an edit is saved as .txt, so it wins
METADATA_NAME = "metadata.jsonl"  # one JSON object a line, as in a Hugging Face "imagefolder"
METADATA_KEYS = ("text", "caption", "prompt")
MAX_CAPTION_BYTES = 2**20
MAX_METADATA_BYTES = 64 * 2**20
LONG_CAPTION = 75  # tokens that the text encoders of Stable Diffusion read at once
MAX_REPEATS = 200  # `2024_holiday` is a date
OTHER_PICTURE_SUFFIXES = frozenset((
    ".jp2", ".j2k", ".jxl", ".psd", ".xcf", ".svg", ".eps", ".pdf", ".ico", ".tga", ".exr", ".hdr", ".ppm", ".pcx",
    ".dds", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2",
))  # fmt: skip
JUNK_NAMES = frozenset(("thumbs.db", "desktop.ini", ".ds_store", "__macosx", "ehthumbs.db", "icon\r"))
UNCAPTIONED = "The picture has no caption"


@dataclass(frozen=True)
class DatasetItem:
    """One usable picture; `width` and `height` in pixels, upright; `sha256` is that of the file."""

    path: Path
    caption: str
    width: int
    height: int
    repeats: int = 1
    sha256: str = ""


@dataclass(frozen=True)
class Finding:
    """Something to know about one file. An `error` means that the picture was left out."""

    file: str
    """Path relative to the dataset, safe to show (see `pictures.shown`); not for opening."""
    level: Literal["error", "warning", "note"]
    message: str


def is_junk(name: str) -> bool:
    """Whether an operating system, not a person, put the file there."""
    return name.startswith("._") or name.lower() in JUNK_NAMES


def suffix_of(name: str) -> str:
    """Lower-case extension with its dot, also of names that only consist of dots."""
    stem, _, extension = name.rpartition(".")
    return f".{extension.lower()}" if stem and extension else ""


def scan_dataset(
    folder: Path,
    *,
    resolution: int = 512,
    trigger: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[DatasetItem], list[Finding]]:
    """Every usable picture under `folder`, by relative path in code-point order, and what was found on the way.

    Each picture is decoded in full. `resolution` only decides what counts as small. A caption without the word
    `trigger` gets it in front, in the item, not in the file. `progress(done, total)` counts pictures.
    Raises `DatasetError` when there is no folder or no usable picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"{shown(folder)} is not a folder: choose a folder with pictures.")
    findings: list[Finding] = []
    files = _walk(folder, findings)
    pictures = [path for path in files if suffix_of(path.name) in PICTURE_SUFFIXES]
    metadata = _Metadata(folder, findings)
    findings += _about_other_files(folder, files, set(pictures), metadata) + _about_case_twins(folder, pictures)

    items: list[DatasetItem] = []
    first_with: dict[str, str] = {}
    for done, (path, checked) in enumerate(zip(pictures, _check_all(pictures), strict=True), 1):
        file = _relative(path, folder)
        if isinstance(checked, DatasetError):
            findings.append(Finding(file, "error", f"{checked} It was left out."))
        else:
            width, height, notes, sha256 = checked
            findings += _about_picture(file, path.name, notes) + _about_size(file, width, height, resolution)
            if (twin := first_with.setdefault(sha256, file)) != file:
                message = f"Is the same picture as {twin}: it counts twice; remove one."
                findings.append(Finding(file, "warning", message))
            caption, about_caption = _read_caption(path, folder, metadata)
            findings += about_caption
            if not caption:
                use = f"the trigger word “{trigger}” is used alone" if trigger else "it is trained without words"
                message = f"{UNCAPTIONED}: {use}; write one to say what it shows."
                findings.append(Finding(file, "warning", message))
            caption = _with_trigger(caption, trigger)
            items.append(DatasetItem(path, caption, width, height, _repeats(path, folder), sha256))
        if progress:
            progress(done, len(pictures))
    findings += _about_repeats(folder, pictures)
    if not items:
        raise DatasetError(_nothing_usable(folder, findings))
    return items, findings


def verdict(items: list[DatasetItem], findings: list[Finding]) -> str:
    """The scan in one sentence: "22 of 24 pictures are usable, 20 have captions."."""
    total = len(items) + sum(finding.level == "error" for finding in findings)
    captioned = len(items) - sum(finding.message.startswith(UNCAPTIONED) for finding in findings)
    are = "picture is" if total == 1 else "pictures are"
    have = "has a caption" if captioned == 1 else "have captions"
    return f"{len(items)} of {total} {are} usable, {captioned} {have}."


def caption_path(picture: Path) -> Path:
    """Where an edited caption of `picture` is saved: `<stem>.txt` beside it."""
    return picture.with_name(picture.name[: len(picture.name) - len(suffix_of(picture.name))] + ".txt")


def write_caption(picture: Path, text: str) -> None:
    """Save `text` as the caption of `picture`: UTF-8, the old or the new caption in full whatever happens.

    Raises `DatasetError` where a link or a folder has the place of the caption, `OSError` where nothing can be written.
    """
    target = caption_path(picture)
    if target.is_symlink():
        raise DatasetError(f"{shown(target.name)} is a link, which is not followed: delete it, then save the caption again.")
    if target.is_dir():
        raise DatasetError(f"{shown(target.name)} is a folder where the caption should be: rename it, then save again.")
    atomic_write(target, text.encode("utf-8", "replace"))


def read_caption(picture: Path) -> tuple[str, list[Finding]]:
    """The caption of `picture` as one line ("" where there is none) and what was odd about it.

    From `<stem>.txt`, `<stem>.caption`, `<name.ext>.txt`, or `metadata.jsonl` in its folder, the first that is there.
    Lines are joined with a comma, or a space where one ends in punctuation; control, direction and zero-width
    characters (but not the joiners inside emoji and some scripts) are removed. Bad captions are findings, not errors.
    """
    picture = Path(picture)
    findings: list[Finding] = []
    caption, about_caption = _read_caption(picture, picture.parent, _Metadata(picture.parent, findings))
    return caption, findings + about_caption


# Walking


def _relative(path: Path, folder: Path) -> str:
    return shown(path.relative_to(folder).as_posix())


def _walk(folder: Path, findings: list[Finding]) -> list[Path]:
    """All files to look at, sorted. Links to folders are not entered, so loops end; all passed over are findings."""
    root, files, waiting = folder.resolve(), [], [folder]

    def skip(path: Path, message: str, level: Literal["error", "warning", "note"] = "note") -> None:
        findings.append(Finding(_relative(path, folder), level, message))

    while waiting:
        parent = waiting.pop()
        try:
            entries = sorted(os.scandir(parent), key=lambda entry: entry.name)
        except OSError as error:
            skip(parent, f"The folder cannot be read ({error.strerror}): what is in it was left out.", "warning")
            continue
        for entry in entries:
            path = parent / entry.name
            is_picture = suffix_of(entry.name) in PICTURE_SUFFIXES
            if is_junk(entry.name):
                skip(path, "Was put there by the operating system: ignored.")
            elif entry.is_dir(follow_symlinks=False):
                if entry.name.startswith("."):
                    skip(path, "Is a hidden folder: ignored.")
                    continue
                if is_picture:
                    skip(path, "Is a folder named like a picture: only what is inside it is used.", "warning")
                waiting.append(path)
            elif entry.is_symlink() and entry.is_dir():
                skip(path, "Is a link to a folder, which is not followed: copy the folder itself.", "warning")
            elif entry.is_symlink() and is_picture and not _leads_inside(path, root):
                skip(path, "Is a link that leaves the dataset: it was left out; copy the picture itself.", "error")
            elif entry.name.startswith(".") and not is_picture:
                skip(path, "Is a hidden file: ignored.")
            else:
                files.append(path)
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def _leads_inside(link: Path, root: Path) -> bool:
    try:
        return link.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):  # leads nowhere, or in a circle
        return False


def _about_other_files(folder: Path, files: list[Path], pictures: set[Path], metadata: "_Metadata") -> list[Finding]:
    """Findings on files that are neither a picture nor the caption of one."""
    findings, strange = [], {}
    captions = {candidate for picture in pictures for candidate in _caption_candidates(picture)}
    for path in files:
        suffix = suffix_of(path.name)
        if path in pictures or path in captions or path.name == METADATA_NAME:
            continue
        if suffix in (".txt", ".caption"):
            message = "Is a caption, but no picture has its name: rename one of the two."
            findings.append(Finding(_relative(path, folder), "warning", message))
        elif suffix in OTHER_PICTURE_SUFFIXES:
            message = f"Is a picture of a kind that cannot be used ({suffix}): it was left out; save it as JPEG or PNG."
            findings.append(Finding(_relative(path, folder), "error", message))
        elif _looks_like_picture(path):
            message = "Looks like a picture, but its name does not end in .jpg or the like: it was left out; rename it."
            findings.append(Finding(_relative(path, folder), "error", message))
        else:
            strange.setdefault(suffix, []).append(path)
    for suffix, paths in strange.items():
        more = f" (and {len(paths) - 1} more {suffix or 'without extension'})" if len(paths) > 1 else ""
        message = f"Is neither a picture nor a caption{more}: not used."
        findings.append(Finding(_relative(paths[0], folder), "note", message))
    return findings + metadata.about_missing_pictures(pictures)


def _looks_like_picture(path: Path) -> bool:
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError:
        return False
    starts = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*")
    return head.startswith(starts) or head[8:12] in (b"WEBP", b"avif", b"heic")


def _about_case_twins(folder: Path, pictures: list[Path]) -> list[Finding]:
    findings, later = [], {}
    for path in reversed(pictures):  # so that of `DUP.png` and `dup.png` the one in capitals is named
        stem = caption_path(path).as_posix()
        twin = later.setdefault(stem.casefold(), stem)
        if twin != stem:
            message = "Differs from another name only in capitals: on Windows and macOS they share a caption; rename one."
            findings.append(Finding(_relative(path, folder), "warning", message))
    return findings


# Pictures


def check_picture(data: bytes, path: Path) -> tuple[int, int, tuple[str, ...]]:
    """(width, height, notes) of a picture that can be trained on. Raises `DatasetError` for one that cannot."""
    image, notes = decode_picture(data, path)
    if min(image.size) < SMALLEST_SIDE:
        size = f"{image.width} x {image.height}"
        raise DatasetError(f"{shown(path.name)} has {size} pixels, too few to train on: use a larger one.")
    return *image.size, notes


def _check(path: Path) -> tuple[int, int, tuple[str, ...], str] | DatasetError:
    try:
        data = read_picture(path)
        return *check_picture(data, path), hashlib.sha256(data).hexdigest()
    except DatasetError as error:
        return error


def _check_all(pictures: list[Path]) -> Iterator[tuple[int, int, tuple[str, ...], str] | DatasetError]:
    if len(pictures) <= 50:
        yield from map(_check, pictures)
        return
    with ThreadPoolExecutor(2) as pool:  # threads, as decoders let go of the interpreter; two, as each may hold 0.5 GB
        yield from pool.map(_check, pictures)


def _about_picture(file: str, name: str, notes: tuple[str, ...]) -> list[Finding]:
    findings = [Finding(file, "note", f"The picture {note}.") for note in notes]
    if any("\udc80" <= character <= "\udcff" for character in name):
        findings.append(Finding(file, "note", "Its name is not UTF-8 and is shown with escapes: rename it."))
    return findings


def _about_size(file: str, width: int, height: int, resolution: int) -> list[Finding]:
    findings = []
    enlargement = resolution / math.sqrt(width * height)
    if enlargement > 1.05:
        message = (
            f"The picture ({width} x {height}) is smaller than the resolution of {resolution}: it is trained small, "
            f"or blurred by being upscaled {enlargement:.1f} times; use a larger one."
        )
        findings.append(Finding(file, "warning", message))
    kept = MAX_ASPECT * min(width, height) / max(width, height)
    if kept < 0.75:
        message = (
            f"The picture ({width} x {height}) is so narrow that only the middle {max(1, round(100 * kept))} % of it "
            "is seen: crop it to the part that matters."
        )
        findings.append(Finding(file, "warning", message))
    return findings


def _repeats_of_folder(folder: Path) -> int:
    found = re.match(r"(\d{1,9})_.", folder.name)
    return int(found[1]) if found and 1 <= int(found[1]) <= MAX_REPEATS else 1


def _repeats(path: Path, folder: Path) -> int:
    return _repeats_of_folder(path.parent) if path.parent != folder else 1


def _about_repeats(folder: Path, pictures: list[Path]) -> list[Finding]:
    return [
        Finding(_relative(parent, folder), "note", f"Its name asks for {repeats} repeats of each picture in it: done.")
        for parent in dict.fromkeys(path.parent for path in pictures)
        if parent != folder and (repeats := _repeats_of_folder(parent)) > 1
    ]


def _nothing_usable(folder: Path, findings: list[Finding]) -> str:
    reasons = [finding for finding in findings if finding.level == "error"]
    if not reasons:
        return f"{shown(folder)} holds no pictures: put JPEG, PNG or WebP files into it."
    listed = "; ".join(f"{finding.file}: {finding.message.rstrip('.')}" for finding in reasons[:5])
    more = f"; and {len(reasons) - 5} more" if len(reasons) > 5 else ""
    return f"{shown(folder)} holds no usable picture. {listed}{more}."


# Captions


def _with_trigger(caption: str, trigger: str) -> str:
    if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def _caption_candidates(picture: Path) -> list[Path]:
    stem = caption_path(picture).name.removesuffix(".txt")
    names = [stem + suffix for suffix in CAPTION_SUFFIXES] + [picture.name + ".txt"]
    return [picture.with_name(name) for name in names]


def _read_caption(picture: Path, folder: Path, metadata: "_Metadata") -> tuple[str, list[Finding]]:
    candidates = [path for path in _caption_candidates(picture) if os.path.lexists(path)]
    present = list({path.name.lower(): path for path in reversed(candidates)}.values())[::-1]  # x.txt may be x.TXT
    if not present:
        text, notes = clean_caption(metadata.caption_of(picture))
        return text, [Finding(_relative(picture, folder), "note", f"Its caption in {METADATA_NAME} {note}.") for note in notes]
    text, findings = "", []
    for used, ignored in itertools.pairwise(present):
        message = f"The picture has several captions: {shown(used.name)} is used before this one."
        findings.append(Finding(_relative(ignored, folder), "note", message))
    path = present[0]
    try:
        text, notes = clean_caption(*decode_text(_read_regular(path, MAX_CAPTION_BYTES)))
        findings += [Finding(_relative(path, folder), "note", f"The caption {note}.") for note in notes]
    except DatasetError as error:
        findings.append(Finding(_relative(path, folder), "warning", f"The caption {error}; it was not read."))
    return text, findings


def _read_regular(path: Path, limit: int) -> bytes:
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
    try:
        if path.is_symlink():
            raise DatasetError("is a link, which is not followed: copy the file itself")
        if path.is_dir():
            raise DatasetError("is a folder, not a text file: rename it")
        with os.fdopen(os.open(path, flags), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DatasetError("is a pipe or a device, not a text file")
            data = file.read(limit + 1)
    except OSError as error:
        raise DatasetError(f"cannot be read ({error.strerror})") from error
    if len(data) > limit:
        raise DatasetError(f"is larger than {limit >> 20} MB, the limit: shorten it")
    return data


_UTF8_LIKE = re.compile(rb"[\xc0-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf7][\x80-\xbf]{3}")
_HIGH_RUN = re.compile(rb"[\x80-\xff]{2,}")
_BYTE_ORDER_MARKS = (  # UTF-32 first: its mark begins with that of UTF-16
    (b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"),
)  # fmt: skip


def decode_text(data: bytes) -> tuple[str, list[str]]:
    """The text of a caption file in whatever encoding, and a note where that had to be guessed. Raises nothing."""
    if data.startswith(b"\xef\xbb\xbf"):
        data = data[3:]
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), "") or _wide_without_mark(data)
    if not encoding:
        try:
            return data.decode("utf-8"), []
        except UnicodeDecodeError:
            encoding = _guess_encoding(data)
    if encoding == "utf-8":
        text = data.decode("utf-8", "replace").replace("\ufffd", "")
        return text, ["is not valid UTF-8: the broken characters were removed; check it and save it as UTF-8"]
    return data.decode(encoding, "replace"), [f"is not UTF-8 and was read as {encoding.upper()}: check it and save it as UTF-8"]


def _wide_without_mark(data: bytes) -> str:
    """UTF-16 or UTF-32 told by where the zero bytes of Latin letters lie; single NULs are not enough."""
    for name, width, letter in (("utf-32-le", 4, 0), ("utf-32-be", 4, 3), ("utf-16-le", 2, 0), ("utf-16-be", 2, 1)):
        units, zeros = len(data) // width, [data[i::width].count(0) for i in range(width)]
        others = [count for i, count in enumerate(zeros) if i != letter]
        if units and len(data) % width == 0 and zeros[letter] == 0 and min(others) > 0.7 * units:
            return name
    return ""


def _guess_encoding(data: bytes) -> str:
    """The likeliest encoding of bytes that are not UTF-8; a guess by how common the resulting characters are."""
    high = len(re.findall(rb"[\x80-\xff]", data))
    if not re.search(rb"[\x80-\xff]", _UTF8_LIKE.sub(b"", data)):
        return "utf-8"  # built like UTF-8, but overlong or a lone surrogate
    for encoding, usual in (("cp932", r"[\u3040-\u30ff]"), ("gb2312", r"[\u4e00-\u9fff]")):
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        # The 3755 commonest Chinese characters lead with B0 to D7; Russian small letters would be the rare ones above.
        common = encoding == "cp932" or sum(0xB0 <= character.encode("gb2312")[0] <= 0xD7 for character in text) > high / 4
        if common and len(re.findall(usual, text)) > high / 8:
            return "gbk" if encoding == "gb2312" else encoding
    in_runs = sum(map(len, _HIGH_RUN.findall(data)))
    return "cp1251" if in_runs > high / 2 else "cp1252"


_ESCAPE_SEQUENCE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?|.)?")
_INVISIBLE = re.compile("[\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]")  # not the joiners U+200C and U+200D


def clean_caption(text: str, notes: list[str] | None = None) -> tuple[str, list[str]]:
    """`text` as one line of visible characters, and `notes` with what was removed or may be cut. See `read_caption`."""
    notes = list(notes or [])
    lines = _INVISIBLE.sub("", text).replace("\t", " ").splitlines()
    joined = ""
    for line in filter(None, map(str.strip, lines)):
        joined += ("" if not joined else " " if joined[-1] in ".,;:!?" else ", ") + line
    visible = _ESCAPE_SEQUENCE.sub("", joined)
    visible = "".join(c for c in visible if unicodedata.category(c) not in ("Cc", "Cs")).strip()
    if visible != joined:
        notes.append("held control characters: they were removed")
    if len(visible) > 20 * LONG_CAPTION or len(re.findall(r"\w+|[^\w\s]", visible)) > LONG_CAPTION:
        notes.append(f"is longer than the {LONG_CAPTION} tokens Stable Diffusion reads at once: its end may not be seen")
    return visible, notes


class _Metadata:
    """The captions in the `metadata.jsonl` files of a folder tree, each file read when first asked for."""

    def __init__(self, folder: Path, findings: list[Finding]):
        self.folder, self.findings = folder, findings
        self._captions: dict[Path, dict[str, str]] = {}

    def caption_of(self, picture: Path) -> str:
        """From the file nearest to the picture, in its folder or one above it within the dataset; "" without one."""
        for parent in picture.parents:
            name = picture.relative_to(parent).as_posix()
            if name in (captions := self._read(parent)):
                return captions[name]
            if parent == self.folder:
                break
        return ""

    def about_missing_pictures(self, pictures: set[Path]) -> list[Finding]:
        missing = []
        for parent in dict.fromkeys([self.folder, *sorted({path.parent for path in pictures})]):
            names = [name for name in self._read(parent) if parent / name not in pictures]
            if names:
                message = f"Has a caption for {shown(names[0])}, which is not there ({len(names)} such in all)."
                missing.append(Finding(_relative(parent / METADATA_NAME, self.folder), "warning", message))
        return missing

    def _read(self, parent: Path) -> dict[str, str]:
        if parent not in self._captions:
            path = parent / METADATA_NAME
            captions, bad = read_metadata(path) if os.path.lexists(path) else ({}, "")
            self._captions[parent] = captions
            if bad:
                self.findings.append(Finding(_relative(path, self.folder), "warning", bad))
        return self._captions[parent]


def read_metadata(path: Path) -> tuple[dict[str, str], str]:
    """file_name -> caption of a `metadata.jsonl`, and a sentence on the lines that could not be used ("" if none)."""
    try:
        text, _ = decode_text(_read_regular(path, MAX_METADATA_BYTES))
    except DatasetError as error:
        return {}, f"The file {error}; its captions were not read."
    captions, bad = {}, Counter()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name = row["file_name"]
            caption = next(row[key] for key in METADATA_KEYS if isinstance(row.get(key), str))
            captions[name.removeprefix("./")] = caption
        except (ValueError, TypeError, KeyError, AttributeError, StopIteration, RecursionError):
            bad[number] = 1
    if not bad:
        return captions, ""
    need = f"each needs a file_name and a {', '.join(METADATA_KEYS[:-1])} or {METADATA_KEYS[-1]}"
    return captions, f"{len(bad)} of its lines cannot be used, the first is line {min(bad)}: {need}."

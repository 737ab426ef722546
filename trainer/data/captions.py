"""The caption of a picture: where it is kept, in whatever encoding, read as one clean line and written as UTF-8.

It never changes a file but through `write_caption`. Odd captions are findings, never errors.
"""

import itertools
import json
import os
import re
import stat
import unicodedata
from collections import Counter
from pathlib import Path

from trainer.data.dataset_files import METADATA_NAME, caption_candidates, caption_path, relative
from trainer.data.issues import Issue, shown
from trainer.errors import DatasetError
from trainer.runs.atomic_files import atomic_write

METADATA_KEYS = ("text", "caption", "prompt")
MAX_CAPTION_BYTES = 2**20
MAX_METADATA_BYTES = 64 * 2**20


def write_caption(picture: Path, text: str) -> None:
    """Save `text` as the caption of `picture`: UTF-8, the old or the new caption in full whatever happens.

    Raises `DatasetError` where a link or a folder has the place of the caption, `OSError` where nothing can be written.
    """
    target = caption_path(picture)
    if target.is_symlink():
        raise DatasetError(
            f"{shown(target.name)} is a link, which is not followed: delete it, then save the caption again."
        )
    if target.is_dir():
        raise DatasetError(
            f"{shown(target.name)} is a folder where the caption should be: rename it, then save again."
        )
    atomic_write(target, text.encode("utf-8", "replace"))


def read_caption(picture: Path, separate_lines: bool = False) -> tuple[str, list[Issue]]:
    """The caption of `picture` as one line ("" where there is none) and what was odd about it.

    From `<stem>.txt`, `<stem>.caption`, `<name.ext>.txt`, or `metadata.jsonl` in its folder, the first that is there.
    Lines are joined with a comma, or a space where one ends in punctuation; control, direction and zero-width
    characters (but not the joiners inside emoji and some scripts) are removed. With `separate_lines` lines
    stay lines. Bad captions are findings, not errors.
    """
    picture = Path(picture)
    findings: list[Issue] = []
    caption, about_caption = caption_of(
        picture, picture.parent, Metadata(picture.parent, findings), separate_lines
    )
    return caption, findings + about_caption


def caption_of(
    picture: Path, folder: Path, metadata: "Metadata", separate_lines: bool = False
) -> tuple[str, list[Issue]]:
    candidates = [path for path in caption_candidates(picture) if os.path.lexists(path)]
    present = list({path.name.lower(): path for path in reversed(candidates)}.values())[
        ::-1
    ]  # x.txt may be x.TXT
    if not present:
        text, notes = clean_caption(metadata.caption_of(picture), separate_lines=separate_lines)
        return text, [
            Issue(
                relative(picture, folder),
                "note",
                f"Its caption in {METADATA_NAME} {note}.",
                "odd-caption",
            )
            for note in notes
        ]
    text, findings = "", []
    for used, ignored in itertools.pairwise(present):
        message = f"The picture has several captions: {shown(used.name)} is used before this one."
        findings.append(Issue(relative(ignored, folder), "note", message, "several-captions"))
    path = present[0]
    try:
        text, notes = clean_caption(
            *decode_text(_read_regular(path, MAX_CAPTION_BYTES)), separate_lines
        )
        findings += [
            Issue(relative(path, folder), "note", f"The caption {note}.", "odd-caption")
            for note in notes
        ]
    except DatasetError as error:
        findings.append(
            Issue(
                relative(path, folder),
                "warning",
                f"The caption {error}; it was not read.",
                "unread-caption",
            )
        )
    return text, findings


def _read_regular(path: Path, limit: int) -> bytes:
    flags = (
        os.O_RDONLY
        | getattr(os, "O_NONBLOCK", 0)
        | getattr(os, "O_BINARY", 0)
        | getattr(os, "O_NOFOLLOW", 0)
    )
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


# Text


_UTF8_LIKE = re.compile(
    rb"[\xc0-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf7][\x80-\xbf]{3}"
)
_HIGH_RUN = re.compile(rb"[\x80-\xff]{2,}")
_BYTE_ORDER_MARKS = (  # UTF-32 first: its mark begins with that of UTF-16
    (b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"),
)  # fmt: skip


def decode_text(data: bytes) -> tuple[str, list[str]]:
    """The text of a caption file in whatever encoding, and a note where that had to be guessed. Raises nothing."""
    if data.startswith(b"\xef\xbb\xbf"):
        data = data[3:]
    encoding = next(
        (name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), ""
    ) or _wide_without_mark(data)
    if not encoding:
        try:
            return data.decode("utf-8"), []
        except UnicodeDecodeError:
            encoding = _guess_encoding(data)
    if encoding == "utf-8":
        text = data.decode("utf-8", "replace").replace("\ufffd", "")
        return text, [
            "is not valid UTF-8: the broken characters were removed; check it and save it as UTF-8"
        ]
    return data.decode(encoding, "replace"), [
        f"is not UTF-8 and was read as {encoding.upper()}: check it and save it as UTF-8"
    ]


def _wide_without_mark(data: bytes) -> str:
    """UTF-16 or UTF-32 told by where the zero bytes of Latin letters lie; single NULs are not enough."""
    for name, width, letter in (
        ("utf-32-le", 4, 0),
        ("utf-32-be", 4, 3),
        ("utf-16-le", 2, 0),
        ("utf-16-be", 2, 1),
    ):
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
        common = (
            encoding == "cp932"
            or sum(0xB0 <= character.encode("gb2312")[0] <= 0xD7 for character in text) > high / 4
        )
        if common and len(re.findall(usual, text)) > high / 8:
            return "gbk" if encoding == "gb2312" else encoding
    in_runs = sum(map(len, _HIGH_RUN.findall(data)))
    return "cp1251" if in_runs > high / 2 else "cp1252"


_ESCAPE_SEQUENCE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?|.)?")
_INVISIBLE = re.compile(
    "[\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]"
)  # not the joiners U+200C and U+200D


def clean_caption(
    text: str, notes: list[str] | None = None, separate_lines: bool = False
) -> tuple[str, list[str]]:
    """`text` as one line of visible characters, and `notes` with what was removed. See `read_caption`.

    With `separate_lines` each line is cleaned by itself.
    """
    notes = list(notes or [])
    if separate_lines:
        cleaned = [clean_caption(line) for line in text.splitlines()]
        notes += dict.fromkeys(note for _, found in cleaned for note in found)
        return "\n".join(line for line, _ in cleaned if line), notes
    lines = _INVISIBLE.sub("", text).replace("\t", " ").splitlines()
    joined = ""
    for line in filter(None, map(str.strip, lines)):
        joined += ("" if not joined else " " if joined[-1] in ".,;:!?" else ", ") + line
    visible = _ESCAPE_SEQUENCE.sub("", joined)
    visible = "".join(c for c in visible if unicodedata.category(c) not in ("Cc", "Cs")).strip()
    if visible != joined:
        notes.append("held control characters: they were removed")
    return visible, notes


class Metadata:
    """The captions in the `metadata.jsonl` files of a folder tree, each file read when first asked for."""

    def __init__(self, folder: Path, findings: list[Issue]):
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

    def about_missing_pictures(self, pictures: set[Path]) -> list[Issue]:
        missing = []
        for parent in dict.fromkeys([self.folder, *sorted({path.parent for path in pictures})]):
            names = [name for name in self._read(parent) if parent / name not in pictures]
            if names:
                message = f"Has a caption for {shown(names[0])}, which is not there ({len(names)} such in all)."
                missing.append(
                    Issue(relative(parent / METADATA_NAME, self.folder), "warning", message)
                )
        return missing

    def _read(self, parent: Path) -> dict[str, str]:
        if parent not in self._captions:
            path = parent / METADATA_NAME
            captions, bad = read_metadata(path) if os.path.lexists(path) else ({}, "")
            self._captions[parent] = captions
            if bad:
                self.findings.append(Issue(relative(path, self.folder), "warning", bad))
        return self._captions[parent]


def read_metadata(path: Path) -> tuple[dict[str, str], str]:
    """file_name -> caption of a `metadata.jsonl`, and a sentence on the lines that could not be used ("" if none)."""
    try:
        text, _ = decode_text(_read_regular(path, MAX_METADATA_BYTES))
    except DatasetError as error:
        return {}, f"The file {error}; its captions were not read."
    captions: dict[str, str] = {}
    bad: Counter[int] = Counter()
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
    return (
        captions,
        f"{len(bad)} of its lines cannot be used, the first is line {min(bad)}: {need}.",
    )

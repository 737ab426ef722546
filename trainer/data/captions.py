"""Captions: reads them in any encoding as one clean line, and writes them as UTF-8.

Only `write_caption` changes a file. An odd caption is an issue, never an error.
"""

import itertools
import json
import os
import re
import stat
import unicodedata
from pathlib import Path

from trainer.data.dataset_files import METADATA_NAME, caption_candidates, caption_path, relative
from trainer.data.issue import Issue, printable
from trainer.errors import DatasetError
from trainer.runs.atomic_files import atomic_write

METADATA_KEYS = ("text", "caption", "prompt")
MAX_CAPTION_BYTES = 2**20
MAX_METADATA_BYTES = 64 * 2**20


# Files


def write_caption(image: Path, text: str) -> None:
    """Saves the caption of an image as UTF-8, atomically.

    Raises `DatasetError` if a link or a folder has the caption's name, and `OSError` if the file
    cannot be written.
    """
    target = caption_path(image)
    name = printable(target.name)
    if target.is_symlink():
        raise DatasetError(
            f"{name} is a link, which is not followed: delete it, then save the caption again."
        )
    if target.is_dir():
        raise DatasetError(
            f"{name} is a folder, but should be the caption: rename it, then save again."
        )
    atomic_write(target, text.encode("utf-8", "replace"))


def read_caption(image: Path, separate_lines: bool = False) -> tuple[str, list[Issue]]:
    """Returns the caption of an image as one line, or "" if it has none, and issues with it.

    The caption is read from `<stem>.txt`, `<stem>.caption`, `<name.ext>.txt`, or the
    `metadata.jsonl` in the same folder, whichever exists first. See `clean_caption` for how it is
    cleaned.
    """
    image = Path(image)
    metadata = MetadataCaptions(image.parent)
    caption, issues = caption_of(image, image.parent, metadata, separate_lines)
    return caption, metadata.issues + issues


def caption_of(
    image: Path, folder: Path, metadata: "MetadataCaptions", separate_lines: bool = False
) -> tuple[str, list[Issue]]:
    """Returns the caption of an image in a dataset, as `read_caption` does."""
    candidates = [path for path in caption_candidates(image) if os.path.lexists(path)]
    by_name: dict[str, Path] = {}
    for path in candidates:  # on Windows and macOS x.txt and x.TXT are one file
        by_name.setdefault(path.name.lower(), path)
    present = list(by_name.values())
    if not present:
        text, notes = clean_caption(metadata.caption_of(image), separate_lines=separate_lines)
        return text, [
            _odd_caption(image, folder, f"Its caption in {METADATA_NAME} {note}.") for note in notes
        ]

    issues: list[Issue] = []
    for used, ignored in itertools.pairwise(present):
        message = f"The image has several captions: {printable(used.name)} is used before this one."
        issues.append(Issue(relative(ignored, folder), "note", message, "several-captions"))
    path = present[0]
    try:
        text, notes = decode_text(_read_regular(path, MAX_CAPTION_BYTES))
    except DatasetError as error:
        message = f"The caption {error}; it was not read."
        return "", [*issues, Issue(relative(path, folder), "warning", message, "unread-caption")]
    text, notes = clean_caption(text, notes, separate_lines)
    return text, issues + [_odd_caption(path, folder, f"The caption {note}.") for note in notes]


def _odd_caption(path: Path, folder: Path, message: str) -> Issue:
    return Issue(relative(path, folder), "note", message, "odd-caption")


def _read_regular(path: Path, limit: int) -> bytes:
    """Returns the bytes of a regular file. Raises `DatasetError` with a message without a name."""
    # O_NONBLOCK keeps open() from waiting for the writer of a FIFO.
    optional = ("O_NONBLOCK", "O_BINARY", "O_NOFOLLOW")
    flags = os.O_RDONLY
    for name in optional:
        flags |= getattr(os, name, 0)
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


# Encodings

_HIGH_BYTE = re.compile(rb"[\x80-\xff]")
_HIGH_RUN = re.compile(rb"[\x80-\xff]{2,}")
_UTF8_LIKE = re.compile(
    rb"[\xc0-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf7][\x80-\xbf]{3}"
)
_BYTE_ORDER_MARKS = (
    # UTF-32 first, because its mark starts with UTF-16's.
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_WIDE_ENCODINGS = (
    # Name, bytes per character, position of the byte that is not zero in a Latin letter.
    ("utf-32-le", 4, 0),
    ("utf-32-be", 4, 3),
    ("utf-16-le", 2, 0),
    ("utf-16-be", 2, 1),
)
_EAST_ASIAN = (
    # Encoding, and the characters that are common in its texts.
    ("cp932", r"[\u3040-\u30ff]"),
    ("gb2312", r"[\u4e00-\u9fff]"),
)


def decode_text(data: bytes) -> tuple[str, list[str]]:
    """Returns the text of a file in any encoding, with a note if the encoding was guessed."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    marked = [name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)]
    encoding = marked[0] if marked else _wide_without_mark(data)
    if not encoding:
        try:
            return data.decode("utf-8"), []
        except UnicodeDecodeError:
            encoding = _guess_encoding(data)
    if encoding == "utf-8":
        note = (
            "is not valid UTF-8: the broken characters were removed; check it and save it as UTF-8"
        )
        return data.decode("utf-8", "replace").replace("\ufffd", ""), [note]
    note = f"is not UTF-8 and was read as {encoding.upper()}: check it and save it as UTF-8"
    return data.decode(encoding, "replace"), [note]


def _wide_without_mark(data: bytes) -> str:
    """Returns UTF-16 or UTF-32, recognised by the zero bytes of Latin letters, or "".

    A few NULs in the text are not enough.
    """
    for name, width, letter in _WIDE_ENCODINGS:
        units = len(data) // width
        zeros = [data[i::width].count(0) for i in range(width)]
        others = [count for i, count in enumerate(zeros) if i != letter]
        if units and len(data) % width == 0 and zeros[letter] == 0 and min(others) > 0.7 * units:
            return name
    return ""


def _guess_encoding(data: bytes) -> str:
    """Returns the likeliest encoding of bytes that are not UTF-8.

    The guess depends on how common the resulting characters are.
    """
    high = len(_HIGH_BYTE.findall(data))
    if not _HIGH_BYTE.search(_UTF8_LIKE.sub(b"", data)):
        return "utf-8"  # the structure of UTF-8, but overlong or with a lone surrogate
    for encoding, usual in _EAST_ASIAN:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        is_likely = encoding == "cp932" or _common_chinese(text) > high / 4
        if is_likely and len(re.findall(usual, text)) > high / 8:
            return "gbk" if encoding == "gb2312" else encoding
    in_runs = sum(map(len, _HIGH_RUN.findall(data)))
    return "cp1251" if in_runs > high / 2 else "cp1252"


def _common_chinese(text: str) -> int:
    """Returns the number of characters among the 3755 commonest Chinese ones.

    In GB 2312 their first byte is B0 to D7. Russian small letters would be the rare ones above.
    """
    return sum(0xB0 <= character.encode("gb2312")[0] <= 0xD7 for character in text)


# Cleaning

_ESCAPE_SEQUENCE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?|.)?")
# The joiners U+200C and U+200D are kept: emoji and some scripts need them.
_INVISIBLE = re.compile("[\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]")


def clean_caption(
    text: str, notes: list[str] | None = None, separate_lines: bool = False
) -> tuple[str, list[str]]:
    """Returns the text as one line of visible characters, and `notes` plus a note on removals.

    Lines are joined with a comma, or with a space if the first one ends in punctuation. Control,
    direction and zero-width characters are removed. With `separate_lines` each line is cleaned
    separately and the lines are kept.
    """
    notes = list(notes or [])
    if separate_lines:
        cleaned = [clean_caption(line) for line in text.splitlines()]
        for _, line_notes in cleaned:
            notes += [note for note in line_notes if note not in notes]
        return "\n".join(line for line, _ in cleaned if line), notes

    lines = _INVISIBLE.sub("", text).replace("\t", " ").splitlines()
    joined = ""
    for line in filter(None, map(str.strip, lines)):
        if joined:
            joined += " " if joined[-1] in ".,;:!?" else ", "
        joined += line
    visible = _ESCAPE_SEQUENCE.sub("", joined)
    visible = "".join(c for c in visible if unicodedata.category(c) not in ("Cc", "Cs")).strip()
    if visible != joined:
        notes.append("held control characters: they were removed")
    return visible, notes


# Tags and words


def tags_of(caption: str) -> list[str]:
    """Returns the parts of a caption between commas, of all its lines."""
    parts = caption.replace("\n", ",").split(",")
    return [part.strip() for part in parts if part.strip()]


def has_word(text: str, word: str) -> bool:
    """Returns whether `text` contains `word` as a whole word, ignoring capitals."""
    folded, wanted = text.casefold(), word.casefold()
    start = folded.find(wanted)
    while start >= 0:
        before, after = folded[:start][-1:], folded[start + len(wanted) :][:1]
        if not (before.isalnum() or before == "_" or after.isalnum() or after == "_"):
            return True
        start = folded.find(wanted, start + 1)
    return False


def with_trigger(caption: str, trigger: str) -> str:
    """Returns the caption with the trigger word in front, if it does not contain it yet."""
    if not trigger or has_word(caption, trigger):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


# metadata.jsonl


class MetadataCaptions:
    """The captions in the `metadata.jsonl` files of a dataset. Each file is read when needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.issues: list[Issue] = []
        """Issues with the files read so far."""
        self._captions: dict[Path, dict[str, str]] = {}

    def caption_of(self, image: Path) -> str:
        """Returns the caption in the file nearest to the image, or "".

        That file is in the image's folder or in one above it, within the dataset.
        """
        for parent in image.parents:
            captions = self._read(parent)
            name = image.relative_to(parent).as_posix()
            if name in captions:
                return captions[name]
            if parent == self.folder:
                break
        return ""

    def about_missing_images(self, images: set[Path]) -> list[Issue]:
        """Returns an issue for each file that has captions of images that do not exist."""
        parents = [self.folder, *sorted({path.parent for path in images})]
        missing = []
        for parent in dict.fromkeys(parents):
            names = [name for name in self._read(parent) if parent / name not in images]
            if names:
                message = (
                    f"The file has a caption for {printable(names[0])}, which does not exist "
                    f"({len(names)} such captions in total)."
                )
                file = relative(parent / METADATA_NAME, self.folder)
                missing.append(Issue(file, "warning", message))
        return missing

    def _read(self, parent: Path) -> dict[str, str]:
        if parent not in self._captions:
            path = parent / METADATA_NAME
            captions, problem = read_metadata(path) if os.path.lexists(path) else ({}, "")
            self._captions[parent] = captions
            if problem:
                self.issues.append(Issue(relative(path, self.folder), "warning", problem))
        return self._captions[parent]


def read_metadata(path: Path) -> tuple[dict[str, str], str]:
    """Returns the captions of a `metadata.jsonl` by file name, and a message on unusable lines."""
    try:
        text, _ = decode_text(_read_regular(path, MAX_METADATA_BYTES))
    except DatasetError as error:
        return {}, f"The file {error}; its captions were not read."
    captions: dict[str, str] = {}
    bad_lines = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name = row["file_name"].removeprefix("./")
            captions[name] = next(
                row[key] for key in METADATA_KEYS if isinstance(row.get(key), str)
            )
        except (ValueError, TypeError, KeyError, AttributeError, StopIteration, RecursionError):
            bad_lines.append(number)
    if not bad_lines:
        return captions, ""
    keys = f"{', '.join(METADATA_KEYS[:-1])} or {METADATA_KEYS[-1]}"
    return captions, (
        f"{len(bad_lines)} of its lines cannot be used, the first is line {bad_lines[0]}: "
        f"each needs a file_name and a {keys}."
    )

"""The names of imported files: what each file is, and the name it gets in the dataset."""

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from trainer.data.dataset_files import MASK_ENDINGS, METADATA_NAME, is_junk, suffix_of
from trainer.data.image_formats import IMAGE_SUFFIXES
from trainer.data.issues import shown

MAX_DEPTH = 16  # folders within folders
TOO_DEEP = f"Lies deeper than {MAX_DEPTH} folders: it was not imported."
MAX_NAME_BYTES = (
    120  # leaves room for a suffix where 255 bytes are the limit, and for deep folders on Windows
)
CAPTION_ENDINGS = (".txt", ".caption")
_RESERVED = re.compile(
    r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE
)  # devices on Windows, whatever the extension


@dataclass
class SourceFile:
    """A file to import: where it lies now, and the folders and name it came under, in one spelling of their accents."""

    path: Path
    folders: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        self.folders, self.name = tuple(map(composed, self.folders)), composed(self.name)

    @property
    def shown(self) -> str:
        return shown("/".join((*self.folders, self.name)))


def kind_of(name: str) -> str:
    """ "picture", "caption", "metadata", "junk" or "other", told by the name alone."""
    if is_junk(name):
        return "junk"
    if name == METADATA_NAME:
        return "metadata"
    if suffix_of(name) in IMAGE_SUFFIXES:
        return "picture"
    return "caption" if suffix_of(name) in CAPTION_ENDINGS else "other"


def why_not_imported(name: str) -> str:
    if suffix_of(name) == ".zip":
        return "Is a zip inside what was dropped: it was not unpacked; drop it by itself."
    return f"Is neither a picture nor a caption ({suffix_of(name) or 'no extension'}): it was not kept."


def safe_name(stem: str, room: int = MAX_NAME_BYTES) -> str:
    """`stem` as a name every file system takes: visible, without `<>:"/\\|?*`, at most `room` bytes of UTF-8.

    What is cut off becomes a hash, so that long names that differ only at their end still differ, and a caption that
    comes later finds its picture.
    """
    visible = "".join(
        c for c in stem if unicodedata.category(c) not in ("Cc", "Cf", "Zl", "Zp") or c == "\u200d"
    )
    visible = composed(visible)
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


def split_name(name: str) -> tuple[str, str]:
    """(stem, ending) such that a picture, its captions `a.txt` or `a.png.txt` and its mask `a.mask.png` have the same stem."""
    mask_ending = next((ending for ending in MASK_ENDINGS if name.lower().endswith(ending)), "")
    if mask_ending and len(name) > len(mask_ending):
        return name[: -len(mask_ending)], mask_ending
    ending = suffix_of(name)
    stem = name[: len(name) - len(ending)]
    if ending in CAPTION_ENDINGS and suffix_of(stem) in IMAGE_SUFFIXES:
        inner = suffix_of(stem)
        return stem[: len(stem) - len(inner)], inner + ending
    return stem, ending


def composed(text: str) -> str:
    """macOS writes an accent as a character of its own, most others write it with its letter, as here."""
    return unicodedata.normalize("NFC", text)


def comparison_key(path: Path) -> str:
    """Equal for names that are one file on a disk that ignores capitals or the composition of accents."""
    return composed(path.as_posix()).casefold()


def with_ending(stem: Path, ending: str) -> Path:
    return stem.with_name(stem.name + ending)

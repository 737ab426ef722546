"""Names of imported files: what each file is, and a safe name for it in the dataset."""

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.data.dataset_files import METADATA_NAME, is_junk, mask_ending, suffix_of
from trainer.data.image_formats import IMAGE_SUFFIXES
from trainer.data.issue import printable

MAX_DEPTH = 16  # folders within folders
TOO_DEEP = f"The file is deeper than {MAX_DEPTH} folders: it was not imported."

# Leaves room for a suffix if 255 bytes are the limit, and for deep folders on Windows.
MAX_NAME_BYTES = 120
FORBIDDEN_CHARACTERS = '<>:"/\\|?*'
# Names of devices on Windows, whatever the extension.
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)

CAPTION_ENDINGS = (".txt", ".caption")

Kind = Literal["image", "caption", "metadata", "junk", "other"]


@dataclass
class SourceFile:
    """A file to import. `folders` and `name` are the ones that the user knows it by.

    Their accents are composed (see `composed`).
    """

    path: Path
    """The file to read, which may have another name."""
    folders: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        self.folders, self.name = tuple(map(composed, self.folders)), composed(self.name)

    @property
    def file(self) -> str:
        """The printable path for issues."""
        return printable("/".join((*self.folders, self.name)))

    @property
    def key(self) -> tuple[tuple[str, ...], str]:
        """Identifies the file by the folders and name that the user knows."""
        return self.folders, self.name


# Kinds of files


def kind_of(name: str) -> Kind:
    """Returns what a file is, according to its name alone."""
    if is_junk(name):
        return "junk"
    if name == METADATA_NAME:
        return "metadata"
    if suffix_of(name) in IMAGE_SUFFIXES:
        return "image"
    return "caption" if suffix_of(name) in CAPTION_ENDINGS else "other"


def why_not_imported(name: str) -> str:
    """Returns the message for a file of kind "other"."""
    if suffix_of(name) == ".zip":
        return "A zip inside another zip or folder is not unpacked: import it separately."
    suffix = suffix_of(name) or "no extension"
    return f"The file is neither an image nor a caption ({suffix}): it was not imported."


def split_name(name: str) -> tuple[str, str]:
    """Splits a name into a stem and an ending.

    An image, its captions `a.txt` and `a.png.txt`, and its mask `a.mask.png` have the same stem.
    """
    ending = mask_ending(name)
    if ending and len(name) > len(ending):
        return name[: -len(ending)], ending
    ending = suffix_of(name)
    stem = name[: len(name) - len(ending)]
    image_suffix = suffix_of(stem)
    if ending in CAPTION_ENDINGS and image_suffix in IMAGE_SUFFIXES:
        return stem[: len(stem) - len(image_suffix)], image_suffix + ending
    return stem, ending


def with_ending(stem: Path, ending: str) -> Path:
    """Returns the path of a stem with an ending of `split_name`."""
    return stem.with_name(stem.name + ending)


# Safe names


def safe_name(stem: str, max_bytes: int = MAX_NAME_BYTES) -> str:
    r"""Returns a name that every file system accepts, of at most `max_bytes` of UTF-8.

    It is visible and has none of `<>:"/\|?*`. A part that is cut off is replaced by a hash, so
    that long names that differ only at the end still differ, and a caption that is imported later
    still matches its image.
    """
    visible = composed("".join(character for character in stem if not _is_invisible(character)))
    allowed = "".join("_" if _is_forbidden(character) else character for character in visible)
    name = allowed.strip(". ")
    if name.startswith(("-", "~")) or _RESERVED.fullmatch(name):
        name = f"_{name}"
    encoded = name.encode()
    if len(encoded) > max_bytes:
        end = "-" + hashlib.sha256(encoded).hexdigest()[:8]
        name = encoded[: max_bytes - len(end)].decode("utf-8", "ignore").rstrip(". ") + end
    return name or "picture"


def _is_invisible(character: str) -> bool:
    is_joiner = character == "\u200d"  # joins emoji
    return unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp") and not is_joiner


def _is_forbidden(character: str) -> bool:
    return unicodedata.category(character) in ("Cs", "Cn") or character in FORBIDDEN_CHARACTERS


def composed(text: str) -> str:
    """Returns the text with each accent as part of its letter.

    macOS writes an accent as a separate character, most other systems do not.
    """
    return unicodedata.normalize("NFC", text)


def comparison_key(path: Path) -> str:
    """Returns a key that is equal for names that may be one file.

    Some disks ignore capitals, and some the composition of accents.
    """
    return composed(path.as_posix()).casefold()

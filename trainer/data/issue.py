"""Issues: what is odd about a file of a dataset, and how its name is printed."""

import os
import unicodedata
from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning", "note"]

HIDDEN_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format, surrogate, line separators
ZERO_WIDTH_JOINER = "\u200d"  # joins emoji, so it is kept


@dataclass(frozen=True)
class Issue:
    """Something the user should know about one file. An `error` means that it is left out."""

    file: str
    """Path relative to the dataset, made printable. Not for opening the file."""
    level: Level
    message: str
    kind: str = ""
    """Identifies issues of the same kind, such as "no-caption". `fixes.FIXES_FOR_KIND` uses it."""
    detail: str = ""
    """Input for the fix, such as the tag that all captions share."""


def printable(text: str | os.PathLike[str]) -> str:
    """Returns text that is safe to print or show.

    Control and direction characters and bytes that are not UTF-8 become escapes.
    """
    return "".join(map(_escaped, os.fspath(text)))


def _escaped(character: str) -> str:
    # surrogateescape represents a byte that is not UTF-8 as U+DC80 to U+DCFF.
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    is_hidden = unicodedata.category(character) in HIDDEN_CATEGORIES
    if is_hidden and character != ZERO_WIDTH_JOINER:
        return character.encode("unicode_escape").decode()
    return character

"""What a look at a dataset found: one record for everything that is odd, that was converted, or that was left out."""

import os
import unicodedata
from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning", "note"]


def shown(name: str | os.PathLike) -> str:
    """`name` as text that is safe to print or show: control and direction characters and bad UTF-8 become escapes."""

    def escape(character: str) -> str:
        if (
            "\udc80" <= character <= "\udcff"
        ):  # a byte that is not UTF-8, as surrogateescape keeps it
            return f"\\x{ord(character) - 0xDC00:02x}"
        hidden = (
            unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
            and character != "\u200d"
        )
        return character.encode("unicode_escape").decode() if hidden else character

    return "".join(map(escape, os.fspath(name)))


@dataclass(frozen=True)
class Issue:
    """Something to know about one file. An `error` means that the picture was left out."""

    file: str
    """Path relative to the dataset, safe to show (see `pictures.shown`); not for opening."""
    level: Level
    message: str
    kind: str = ""
    """A word for all findings of the kind, by which they are counted and cured: "no-caption"."""
    detail: str = ""
    """What the cure needs to know: the tag that all captions share."""

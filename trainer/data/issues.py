"""What a look at a dataset found: one record for everything that is odd, that was converted, or that was left out."""

from dataclasses import dataclass
from typing import Literal

OWN_FOLDER = ".atelier"  # in a dataset: what this program keeps beside the pictures (crops, the journal); never read as pictures

Level = Literal["error", "warning", "note"]


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

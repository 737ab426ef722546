"""Name and tags that a person gave a run in the Library after its training."""

import json
from pathlib import Path
from typing import TypedDict

from app.views import labels

FILE = "library.json"


class Notes(TypedDict):
    name: str
    """ "" if the run was not renamed."""
    tags: list[str]


def read_notes(folder: Path) -> Notes:
    """Returns name and tags of a run, empty ones if there are none."""
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return {"name": str(content["name"]), "tags": [str(tag) for tag in content["tags"]]}
    except (OSError, ValueError, KeyError, TypeError):
        return {"name": "", "tags": []}


def name_of(folder: Path) -> str:
    """Returns the name of a run in the Library."""
    return read_notes(folder)["name"] or labels.title(folder)

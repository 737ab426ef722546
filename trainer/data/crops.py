"""Where a person moved the crop of a picture to: kept beside the pictures, by the name that picture, caption and mask share."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from trainer.curation.history import Edit
from trainer.data.captions import stem_of
from trainer.data.issues import OWN_FOLDER
from trainer.errors import DatasetError

FILE = "crops.json"
Centre = tuple[float, float]
"""The point of a picture that should be in the middle of its crop, from left and top, 0 to 1."""


def read(dataset: Path) -> dict[Path, Centre]:
    """Stem of each picture whose crop was moved -> its centre. A damaged file is one without crops."""
    try:
        rows = json.loads((dataset / OWN_FOLDER / FILE).read_bytes())
        return {dataset / name: _centre(place) for name, place in rows.items()}
    except (OSError, ValueError, TypeError, AttributeError, DatasetError):
        return {}


def move(dataset: Path, picture: Path, centre: Centre | None) -> Edit:
    """The edit that moves the crop of a picture, or with None lets the crop mode choose again. Raises `DatasetError`."""
    moved = read(dataset)
    moved.pop(stem_of(picture), None)
    if centre is not None:
        moved[stem_of(picture)] = _centre(centre)
    return Edit(dataset / OWN_FOLDER / FILE, _encoded(dataset, moved))


def _encoded(dataset: Path, moved: Mapping[Path, Centre]) -> bytes:
    rows = {stem.relative_to(dataset).as_posix(): centre for stem, centre in sorted(moved.items())}
    return json.dumps(rows, indent=0).encode()


def _centre(place: object) -> Centre:
    """Raises `DatasetError` for what is no place in a picture."""
    try:
        x, y = (round(float(value), 4) for value in place)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise DatasetError("The place of a crop is two numbers from 0 to 1.") from None
    if not (math.isfinite(x) and math.isfinite(y) and 0 <= x <= 1 and 0 <= y <= 1):
        raise DatasetError("The place of a crop is two numbers from 0 to 1.")
    return x, y

"""Where a person moved the crop of a picture to: kept beside the pictures, by the name that picture, caption and mask share."""

import json
import math
from pathlib import Path

from trainer.data.issues import OWN_FOLDER
from trainer.errors import DatasetError

FILE = "crops.json"
Centre = tuple[float, float]
"""The point of a picture that should be in the middle of its crop, from left and top, 0 to 1."""


def read(dataset: Path) -> dict[Path, Centre]:
    """Stem of each picture whose crop was moved -> its centre. A damaged file is one without crops."""
    try:
        rows = json.loads((dataset / OWN_FOLDER / FILE).read_bytes())
        return {dataset / name: centre_of(place) for name, place in rows.items()}
    except (OSError, ValueError, TypeError, AttributeError, DatasetError):
        return {}


def centre_of(place: object) -> Centre:
    """Raises `DatasetError` for what is no place in a picture."""
    try:
        x, y = (round(float(value), 4) for value in place)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise DatasetError("The place of a crop is two numbers from 0 to 1.") from None
    if not (math.isfinite(x) and math.isfinite(y) and 0 <= x <= 1 and 0 <= y <= 1):
        raise DatasetError("The place of a crop is two numbers from 0 to 1.")
    return x, y

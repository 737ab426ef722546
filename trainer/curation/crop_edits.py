"""Moves the crop of an image, as an edit that `history` writes and can undo."""

import json
from pathlib import Path

from trainer.curation.history import Edit
from trainer.data import buckets
from trainer.data.buckets import Centre
from trainer.data.dataset_files import OWN_FOLDER, stem_of


def move(dataset: Path, image: Path, centre: Centre | None) -> Edit:
    """Returns the edit that moves the crop of an image, or with None resets it to the crop mode.

    Raises `DatasetError` if the centre is not two numbers from 0 to 1.
    """
    centres = buckets.read_crop_centres(dataset)
    centres.pop(stem_of(image), None)
    if centre is not None:
        centres[stem_of(image)] = buckets.checked_centre(centre)
    rows = {stem.relative_to(dataset).as_posix(): point for stem, point in sorted(centres.items())}
    return Edit(dataset / OWN_FOLDER / buckets.CROPS_FILE, json.dumps(rows, indent=0).encode())

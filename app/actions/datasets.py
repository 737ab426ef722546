"""The datasets of the page: folders below `outputs/datasets`, identified by name, never by path.

Every name from the browser goes through `resolve` or `resolve_image`. What does not exist and what
is not allowed raise the same error.
"""

import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from app.actions.records import CropView, Example
from trainer import config
from trainer.curation import ingest
from trainer.data import buckets, dataset_files
from trainer.data import scan as dataset_scan
from trainer.data.image_formats import IMAGE_SUFFIXES
from trainer.data.issue import Issue
from trainer.errors import DatasetError
from trainer.models.model_files import EMBEDDED_FOLDER
from trainer.runs import run_folder

EXAMPLES = EMBEDDED_FOLDER.parent / "examples"
EXAMPLE_TITLES = {"subject": "A subject", "style": "A style", "photos": "Photographs"}
ORDINARY_WORDS = {
    *("a", "an", "the", "one", "two", "some"),
    *("of", "on", "in", "at", "with", "and", "by", "from"),
    *("photo", "photograph", "picture", "image", "drawing", "painting", "style"),
}
"""Words that all captions may share without being a trigger word."""
MIN_CAPTIONS_FOR_TRIGGER = 3


# Names


def root() -> Path:
    """Returns the folder of all datasets."""
    return run_folder.outputs_folder() / "datasets"


def names() -> list[str]:
    """Returns the names of all datasets, the last changed first."""
    if not root().is_dir():
        return []
    folders = [
        folder
        for folder in root().iterdir()
        if folder.is_dir() and folder.name == run_folder.slug(folder.name)
    ]
    folders.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
    return [folder.name for folder in folders]


def resolve(name: object) -> Path:
    """Returns the folder of a dataset. Raises DatasetError if no dataset has this name."""
    folder = root() / str(name)
    is_plain_name = isinstance(name, str) and run_folder.slug(name) == name
    if not is_plain_name or not folder.is_dir() or folder.is_symlink():
        raise DatasetError("There is no such dataset; choose one from the list.")
    return folder


def resolve_image(name: object, file: object) -> Path:
    """Returns an image of a dataset by its path below the dataset's folder.

    Raises DatasetError if it does not exist.
    """
    folder = resolve(name)
    path = folder / str(file)
    if isinstance(file, str) and not os.path.isfile(path):
        path = _find_by_printed_name(folder, file) or path
    if (
        not isinstance(file, str)
        or path.suffix.lower() not in IMAGE_SUFFIXES
        or not os.path.isfile(path)
        or not path.resolve().is_relative_to(folder.resolve())
    ):
        raise DatasetError("There is no such image in this dataset.")
    return path


def _find_by_printed_name(folder: Path, file: str) -> Path | None:
    """Returns the file whose name is not UTF-8, and which the browser shows as `file`."""
    for path in dataset_files.files_of(folder):
        if dataset_files.relative(path, folder) == file:
            return path
    return None


# New datasets


def add(name: str, sources: Sequence[Path | tuple[Path, str]]) -> tuple[str, list[Issue]]:
    """Copies files into a dataset, which is made if it is new.

    Args:
        name: The name of the dataset.
        sources: Files, or pairs of a file and the name that it had.

    Returns:
        The name of the dataset, and the issues with the files.
    """
    slug = run_folder.slug(name or "my-dataset")
    folder = root() / slug
    folder.mkdir(parents=True, exist_ok=True)
    issues = ingest.import_files(sources, folder)
    os.utime(folder)  # the dataset that was changed last is the first in the list
    return slug, issues


def examples() -> list[Example]:
    """Returns the example datasets that are installed."""
    return [
        {"id": example, "title": title}
        for example, title in EXAMPLE_TITLES.items()
        if (EXAMPLES / example).is_dir()
    ]


def add_example(example: object) -> str:
    """Copies an example dataset, unless there is a copy already. Returns the name of the copy."""
    if example not in EXAMPLE_TITLES or not (EXAMPLES / str(example)).is_dir():
        raise DatasetError("There is no such example.")
    slug = f"example-{example}"
    copy = root() / slug
    if copy.is_dir() and any(path.suffix.lower() in IMAGE_SUFFIXES for path in copy.iterdir()):
        os.utime(copy)
        return slug
    sources = []
    for path in sorted((EXAMPLES / str(example)).iterdir()):
        if path.suffix in (".txt", *IMAGE_SUFFIXES) and path.stem != "LICENSE":
            sources.append(path)
    return add(slug, sources)[0]


# Contents


def scan(name: str) -> dataset_scan.Scan:
    """Returns the images and issues of a dataset. Reads the files only if one of them changed.

    Checks that depend on the settings of a run use the defaults. Raises DatasetError if no image
    is usable.
    """
    folder = resolve(name)
    return _scan(folder, signature(folder))


@lru_cache(maxsize=32)
def _scan(folder: Path, signature: int) -> dataset_scan.Scan:
    return dataset_scan.scan_dataset(folder)


def signature(folder: Path) -> int:
    """Returns a number that changes with each file of the dataset and each crop."""
    files = []
    folders = [folder]
    while folders:
        for entry in os.scandir(folders.pop()):
            if not entry.is_dir(follow_symlinks=False):
                file = entry.stat(follow_symlinks=False)
                files.append((entry.path, file.st_size, file.st_mtime_ns))
            elif not entry.name.startswith("."):
                folders.append(Path(entry.path))
    crops = folder / dataset_files.OWN_FOLDER / buckets.CROPS_FILE
    return hash((tuple(sorted(files)), crops.read_bytes() if crops.is_file() else b""))


def crop_view(item: dataset_scan.DatasetItem, settings: config.Dataset) -> CropView:
    """Returns the part of an image that is used in training, and its size in pixels."""
    crop = dataset_scan.crop_of(item, settings)
    return {
        "box": [round(side, 5) for side in buckets.box_of(crop)],
        "bucket": list(crop.bucket),
        "moved": item.crop_centre is not None,
    }


def suggest_trigger(items: Sequence[dataset_scan.DatasetItem]) -> str:
    """Returns the first word that all captions share, "" if there is none.

    Such a word is probably used as the trigger word already. Ordinary words do not count.
    """
    words = [re.findall(r"[^\s,.;:!?()]+", item.caption.lower()) for item in items]
    if len(words) < MIN_CAPTIONS_FOR_TRIGGER:
        return ""
    shared = set.intersection(*map(set, words)) - ORDINARY_WORDS
    return next((word for word in words[0] if word in shared), "")

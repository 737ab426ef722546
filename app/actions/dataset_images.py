"""Thumbnails and masks of a dataset's images, addressed by a key instead of a file name."""

import hashlib
import io
from functools import lru_cache
from pathlib import Path

from app.actions import datasets
from trainer.data import dataset_files, images
from trainer.data.image_formats import IMAGE_SUFFIXES
from trainer.errors import DatasetError
from trainer.runs import run_folder
from trainer.runs.atomic_files import atomic_write

THUMBNAIL, LARGE = 320, 1280
"""Pixels of the longer side."""


def thumbnail(name: object, key: str, side: int = THUMBNAIL) -> Path:
    """Returns a WebP copy of an image, at most `side` pixels long. Makes it if it is missing.

    Raises DatasetError if the dataset has no image with this key.
    """
    folder = datasets.resolve(name)
    changed = folder.stat().st_mtime_ns
    file = _files_by_key(folder, changed).get(key)
    if file is None:
        # A change of a folder inside does not change the time of the dataset's folder.
        _files_by_key.cache_clear()
        file = _files_by_key(folder, changed).get(key)
    image = datasets.resolve_image(name, file)
    target = _cached_file(f"{image}{image.stat().st_mtime_ns}{side}", ".webp")
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        images.save_thumbnail(image, target, side)
    return target


def mask_image(name: object, key: str) -> Path:
    """Returns the mask of an image as a grey PNG of at most `LARGE` pixels.

    Raises DatasetError if the dataset has no image with this key, or if the image has no mask.
    """
    folder = datasets.resolve(name)
    file = _files_by_key(folder, folder.stat().st_mtime_ns).get(key)
    mask = _mask_of(name, datasets.resolve_image(name, file))
    target = _cached_file(f"{mask}{mask.stat().st_mtime_ns}", ".png")
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        image = images.open_image(mask)[0].convert("L")
        image.thumbnail((LARGE, LARGE))
        png = io.BytesIO()
        image.save(png, "PNG")
        atomic_write(target, png.getvalue())
    return target


def _mask_of(name: object, image: Path) -> Path:
    beside = image.parent.glob("*.png")
    in_mask_folder = (image.parent / dataset_files.MASK_FOLDER).glob("*.png")
    _, masks = dataset_files.pair_masks([image, *beside, *in_mask_folder])
    if image not in masks:
        raise DatasetError("The image has no mask.")
    relative_path = masks[image].relative_to(datasets.resolve(name))
    return datasets.resolve_image(name, relative_path.as_posix())


def mask_url(name: object, key: str, mask: Path | None) -> str:
    """Returns the URL of a mask, a new one for each content, or "" without a mask."""
    if mask is None or not mask.exists():
        return ""
    return f"/mask/{name}/{key}?v={mask.stat().st_mtime_ns}"


def key_of(file: str) -> str:
    """Returns the key of an image from its path below the dataset's folder."""
    return _hash(file)[:24]


@lru_cache(maxsize=8)
def _files_by_key(folder: Path, changed: int) -> dict[str, str]:
    files = {}
    for path in folder.rglob("*"):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            file = path.relative_to(folder).as_posix()
            files[key_of(file)] = file
    return files


def _cached_file(content: str, suffix: str) -> Path:
    """Returns the place in the cache for something that depends on `content`."""
    folder = run_folder.outputs_folder() / "cache" / "thumbs"
    return folder / f"{_hash(content)[:32]}{suffix}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

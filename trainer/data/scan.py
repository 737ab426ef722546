"""Scans a dataset: the images to train on, and an issue for everything odd or left out.

A scan never changes the dataset, and leaves nothing out without an issue. The second half of this
module applies the settings to the scanned images: repeats, crops, and the validation set.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from trainer import config
from trainer.config import RunConfig, folder_repeats
from trainer.data import checks, token_count
from trainer.data.buckets import Centre, Crop, choose_crop, read_crop_centres, squeeze_whole_image
from trainer.data.captions import MetadataCaptions, caption_of, with_trigger
from trainer.data.dataset_files import (
    about_case_duplicates,
    about_unused_files,
    is_image,
    pair_masks,
    relative,
    stem_of,
    walk,
)
from trainer.data.image_stats import ImageStats, stats_of_all
from trainer.data.issue import Issue, printable
from trainer.errors import DatasetError

MAX_REPEATS = 200  # a larger number in a folder's name, as in `2024_holiday`, is a date
MIN_IMAGES_FOR_VALIDATION_SET = 10
MAX_REASONS = 5  # listed if no image is usable


@dataclass(frozen=True)
class DatasetItem:
    """A usable image and its caption."""

    path: Path
    caption: str
    width: int
    """In pixels, upright, as `height`."""
    height: int
    repeats: int = 1
    sha256: str = ""
    """Of the file."""
    mask: Path | None = None
    """A grey image: white parts are learned in full, black parts not at all."""
    focus: Centre = (0.5, 0.5)
    """The most interesting point (`image_stats.focus_of`)."""
    crop_centre: Centre | None = None
    """The centre of the crop, if it was moved by hand."""


class Scan(NamedTuple):
    """The result of scanning a dataset."""

    items: list[DatasetItem]
    """By relative path in code-point order."""
    issues: list[Issue]


def scan_dataset(
    folder: Path,
    settings: config.Dataset | None = None,
    *,
    tokenizer: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scan:
    """Returns every usable image below `folder` and the issues found.

    Each image is decoded in full, once per content. `settings` are the run's (default: the
    defaults). They decide what the checks report and how captions are read: a caption without the
    trigger word gets it in front, in the item but not in the file, and with `caption_wildcards`
    the lines of a caption are kept. Captions are measured with the `tokenizer` folder of the base,
    or roughly without one. `progress(done, total)` counts images.

    Raises `DatasetError` if the folder does not exist or contains no usable image.
    """
    folder, settings = Path(folder), settings or config.Dataset()
    if not folder.is_dir():
        raise DatasetError(f"{printable(folder)} is not a folder: choose a folder with images.")

    # Sort the files into images, masks, captions and others.
    issues: list[Issue] = []
    files = walk(folder, issues)
    images, masks = pair_masks(path for path in files if is_image(path))
    metadata = MetadataCaptions(folder)
    issues += about_unused_files(folder, files, set(images), set(masks.values()))
    issues += metadata.about_missing_images(set(images))
    issues += about_case_duplicates(folder, images)

    # Read each image and its caption.
    usable: list[_UsableImage] = []
    centres = read_crop_centres(folder)
    for path, stats in zip(images, stats_of_all(images, progress), strict=True):
        file = relative(path, folder)
        if stats.error:
            message = f"{printable(path.name)}{stats.error} It was left out."
            issues.append(Issue(file, "error", message, "unreadable"))
            continue
        caption, caption_issues = caption_of(path, folder, metadata, settings.caption_wildcards)
        item = _item(path, folder, stats, caption, masks.get(path), centres.get(stem_of(path)))
        crop = crop_of(item, settings)
        issues += checks.about_image(file, path.name, stats, crop, settings) + caption_issues
        usable.append(_UsableImage(file, item, stats))

    # Compare the images and captions with each other.
    issues += metadata.issues
    issues += _about_all(usable, settings, tokenizer)
    issues += _about_repeats(folder, images)
    if not usable:
        raise DatasetError(_nothing_usable(folder, issues))
    return Scan([_with_trigger(image.item, settings.trigger) for image in usable], issues)


class _UsableImage(NamedTuple):
    file: str
    """The printable path."""
    item: DatasetItem
    """With the caption as in the file, without the trigger word."""
    stats: ImageStats


def _item(
    path: Path,
    folder: Path,
    stats: ImageStats,
    caption: str,
    mask: Path | None,
    crop_centre: Centre | None,
) -> DatasetItem:
    return DatasetItem(
        path,
        caption,
        stats.width,
        stats.height,
        repeats=1 if path.parent == folder else repeats_of_folder(path.parent),
        sha256=stats.sha256,
        mask=mask,
        focus=stats.focus,
        crop_centre=crop_centre,
    )


def _about_all(
    usable: list[_UsableImage], settings: config.Dataset, tokenizer: Path | None
) -> list[Issue]:
    """Returns the issues that concern several images or captions."""
    images = [(image.file, image.stats) for image in usable]
    captions = [(image.file, image.item.caption) for image in usable]
    captioned = {file for file, caption in captions if caption}
    return [
        *checks.about_duplicates(images, captioned),
        *checks.about_mixed_sizes(images, settings),
        *checks.about_captions(captions, settings, token_count.counter(tokenizer)),
    ]


def _with_trigger(item: DatasetItem, trigger: str) -> DatasetItem:
    return replace(item, caption=with_trigger(item.caption, trigger))


def _nothing_usable(folder: Path, issues: list[Issue]) -> str:
    reasons = [issue for issue in issues if issue.level == "error"]
    if not reasons:
        return f"{printable(folder)} contains no images: put JPEG, PNG or WebP files into it."
    listed = "; ".join(
        f"{issue.file}: {issue.message.rstrip('.')}" for issue in reasons[:MAX_REASONS]
    )
    rest = len(reasons) - MAX_REASONS
    more = f"; and {rest} more" if rest > 0 else ""
    return f"{printable(folder)} contains no usable image. {listed}{more}."


# Repeats


def repeats_of_folder(folder: Path) -> int:
    """Returns the repeats in a folder's name, as in `10_cat`, or 1."""
    match = re.match(r"(\d{1,9})_.", folder.name)
    repeats = int(match[1]) if match else 1
    return repeats if 1 <= repeats <= MAX_REPEATS else 1


def _about_repeats(dataset: Path, images: list[Path]) -> list[Issue]:
    issues = []
    for parent in dict.fromkeys(path.parent for path in images):
        repeats = 1 if parent == dataset else repeats_of_folder(parent)
        if repeats > 1:
            message = f"The name of the folder sets {repeats} repeats of each image in it."
            issues.append(Issue(relative(parent, dataset), "note", message))
    return issues


def override_repeats(
    items: list[DatasetItem], folder: Path, lines: Iterable[str]
) -> list[DatasetItem]:
    """Returns the items with the repeats that `dataset.repeats` sets for their folders.

    Raises `DatasetError` if a folder of the setting contains no images.
    """
    chosen = folder_repeats(lines)
    folders = [item.path.parent.relative_to(folder).as_posix() for item in items]
    missing = [name for name in chosen if name not in folders]
    if missing:
        raise DatasetError(
            f"dataset.repeats: {printable(folder)} has no folder {printable(missing[0])} "
            "with images."
        )
    return [
        replace(item, repeats=chosen.get(name, item.repeats))
        for item, name in zip(items, folders, strict=True)
    ]


# Sizes and crops


def resolutions(run: RunConfig) -> tuple[int, ...]:
    """Returns the resolutions at which each image is trained, in pixels."""
    return run.dataset.resolution, *run.dataset.resolutions


def crop_of(item: DatasetItem, settings: config.Dataset) -> Crop:
    """Returns the crop of an image. The page shows the same crop that the VAE is given."""
    step = min(settings.bucket_step, settings.resolution)
    if settings.crop == "none" and item.crop_centre is None:
        return squeeze_whole_image(
            item.width, item.height, settings.resolution, step, settings.allow_upscale
        )
    automatic = item.focus if settings.crop == "salient" else (0.5, 0.5)
    return choose_crop(
        item.width,
        item.height,
        settings.resolution,
        step,
        settings.max_aspect,
        settings.allow_upscale,
        item.crop_centre or automatic,
    )


# The validation set


def held_out_count(run: RunConfig, images: int) -> int:
    """Returns how many of so many images are in the validation set."""
    if images < MIN_IMAGES_FOR_VALIDATION_SET:
        return 0
    return round(images * run.dataset.hold_out)

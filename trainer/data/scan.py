"""A folder of pictures and captions, read: what is trained on, and one finding for everything that is odd or left out.

It never changes the folder, and never leaves anything out without naming it.
"""

import re
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from trainer import config
from trainer.config import RunConfig, folder_repeats
from trainer.data import buckets, checks, token_count
from trainer.data.buckets import Centre, Crop, choose_crop, whole_picture
from trainer.data.captions import Metadata, caption_of
from trainer.data.dataset_files import (
    MASK_ENDINGS,
    METADATA_NAME,
    OTHER_IMAGE_SUFFIXES,
    caption_candidates,
    pair_masks,
    relative,
    stem_of,
    suffix_of,
    walk,
)
from trainer.data.image_formats import IMAGE_SUFFIXES
from trainer.data.image_stats import inspect_all
from trainer.data.issues import Issue, shown
from trainer.errors import DatasetError

SMALLEST_SET_TO_HOLD_OUT = 10
MAX_REPEATS = 200  # `2024_holiday` is a date


@dataclass(frozen=True)
class DatasetItem:
    """One usable picture; `width` and `height` in pixels, upright; `sha256` is that of the file."""

    path: Path
    caption: str
    width: int
    height: int
    repeats: int = 1
    sha256: str = ""
    mask: Path | None = None
    """A grey picture of where to look: white is learned from in full, black not at all."""
    focus: tuple[float, float] = (0.5, 0.5)
    """Where the picture is most interesting, from left and top, 0 to 1 (`inspection.focus_of`)."""
    crop_centre: Centre | None = None
    """Where a person moved its crop to."""


def scan_dataset(
    folder: Path,
    *,
    resolution: int = 512,
    trigger: str = "",
    separate_lines: bool = False,
    tokenizer: Path | None = None,
    caption_tokens: int = token_count.LIMIT,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[DatasetItem], list[Issue]]:
    """Every usable picture under `folder`, by relative path in code-point order, and what was found on the way.

    Each picture is decoded in full, once for each content. `resolution` only decides what counts as small. A caption
    without the word `trigger` gets it in front, in the item, not in the file. With `separate_lines` the lines of a caption
    stay lines. Captions are measured with the `tokenizer` folder of the base, without one roughly; longer than
    `caption_tokens` is too long. `progress(done, total)` counts pictures.
    Raises `DatasetError` when there is no folder or no usable picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"{shown(folder)} is not a folder: choose a folder with pictures.")
    findings: list[Issue] = []
    files = walk(folder, findings)
    pictures, masks = pair_masks(path for path in files if suffix_of(path.name) in IMAGE_SUFFIXES)
    metadata = Metadata(folder, findings)
    findings += _about_other_files(
        folder, files, set(pictures), set(masks.values()), metadata
    ) + _about_case_twins(folder, pictures)

    items: list[DatasetItem] = []
    used, captioned, moved = [], set(), buckets.read(folder)
    for path, facts in zip(pictures, inspect_all(pictures, progress), strict=True):
        file = relative(path, folder)
        if facts.error:
            findings.append(
                Issue(
                    file, "error", f"{shown(path.name)}{facts.error} It was left out.", "unreadable"
                )
            )
            continue
        findings += checks.about_image(file, path.name, facts, resolution)
        caption, about_caption = caption_of(path, folder, metadata, separate_lines)
        findings += about_caption
        items.append(
            DatasetItem(
                path,
                caption,
                facts.width,
                facts.height,
                _repeats(path, folder),
                facts.sha256,
                masks.get(path),
                facts.focus,
                moved.get(stem_of(path)),
            )  # fmt: skip
        )
        used.append((file, facts))
        captioned |= {file} if caption else set()
    findings += checks.about_twins(used, captioned) + checks.about_sizes(used, resolution)
    captions = [(file, item.caption) for (file, _), item in zip(used, items, strict=True)]
    findings += checks.about_captions(
        captions, trigger, token_count.counter(tokenizer), caption_tokens
    ) + _about_repeats(folder, pictures)
    if not items:
        raise DatasetError(_nothing_usable(folder, findings))
    return [replace(item, caption=with_trigger(item.caption, trigger)) for item in items], findings


def override_repeats(
    items: list[DatasetItem], folder: Path, lines: Iterable[str]
) -> list[DatasetItem]:
    """The items with the repeats that `dataset.repeats` gives their folders. Raises DatasetError for a folder without pictures."""
    chosen = folder_repeats(lines)
    folders = [item.path.parent.relative_to(folder).as_posix() for item in items]
    if missing := [name for name in chosen if name not in folders]:
        raise DatasetError(
            f"dataset.repeats: there is no folder {shown(missing[0])} with pictures in {shown(folder)}."
        )
    return [
        replace(item, repeats=chosen.get(name, item.repeats))
        for item, name in zip(items, folders, strict=True)
    ]


def crop_of(item: DatasetItem, settings: config.Dataset) -> Crop:
    """The part of a picture that is trained on: what the page shows is what the VAE is given."""
    if settings.crop == "none" and item.crop_centre is None:
        return whole_picture(
            item.width,
            item.height,
            settings.resolution,
            settings.bucket_step,
            settings.allow_upscale,
        )
    centre = item.crop_centre or (item.focus if settings.crop == "salient" else (0.5, 0.5))
    return choose_crop(
        item.width,
        item.height,
        settings.resolution,
        settings.bucket_step,
        settings.max_aspect,
        settings.allow_upscale,
        centre,
    )


def _about_other_files(
    folder: Path, files: list[Path], pictures: set[Path], masks: set[Path], metadata: Metadata
) -> list[Issue]:
    """Findings on files that are neither a picture nor the caption of one."""
    findings: list[Issue] = []
    strange: dict[str, list[Path]] = {}
    captions = {candidate for picture in pictures for candidate in caption_candidates(picture)}
    for path in files:
        suffix = suffix_of(path.name)
        if path in pictures or path in captions or path in masks or path.name == METADATA_NAME:
            continue
        if path.name.lower().endswith(MASK_ENDINGS):
            message = (
                "Is a mask, but no picture has its name: it is not used; rename one of the two."
            )
            findings.append(Issue(relative(path, folder), "warning", message, "orphan"))
            continue
        if suffix in (".txt", ".caption"):
            message = "Is a caption, but no picture has its name: rename one of the two."
            findings.append(Issue(relative(path, folder), "warning", message, "orphan"))
        elif suffix in OTHER_IMAGE_SUFFIXES:
            message = f"Is a picture of a kind that cannot be used ({suffix}): it was left out; save it as JPEG or PNG."
            findings.append(Issue(relative(path, folder), "error", message, "unreadable"))
        elif _looks_like_picture(path):
            message = "Looks like a picture, but its name does not end in .jpg or the like: it was left out; rename it."
            findings.append(Issue(relative(path, folder), "error", message, "misnamed"))
        else:
            strange.setdefault(suffix, []).append(path)
    for suffix, paths in strange.items():
        more = (
            f" (and {len(paths) - 1} more {suffix or 'without extension'})"
            if len(paths) > 1
            else ""
        )
        message = f"Is neither a picture nor a caption{more}: not used."
        findings.append(Issue(relative(paths[0], folder), "note", message))
    return findings + metadata.about_missing_pictures(pictures)


def _looks_like_picture(path: Path) -> bool:
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError:
        return False
    starts = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*")
    return head.startswith(starts) or head[8:12] in (b"WEBP", b"avif", b"heic")


def _about_case_twins(folder: Path, pictures: list[Path]) -> list[Issue]:
    findings: list[Issue] = []
    later: dict[str, str] = {}
    for path in reversed(
        pictures
    ):  # so that of `DUP.png` and `dup.png` the one in capitals is named
        stem = stem_of(path).as_posix()
        twin = later.setdefault(stem.casefold(), stem)
        if twin != stem:
            message = "Differs from another name only in capitals: on Windows and macOS they share a caption; rename one."
            findings.append(Issue(relative(path, folder), "warning", message, "case-twin"))
    return findings


# Folders


def _repeats_of_folder(folder: Path) -> int:
    found = re.match(r"(\d{1,9})_.", folder.name)
    return int(found[1]) if found and 1 <= int(found[1]) <= MAX_REPEATS else 1


def _repeats(path: Path, folder: Path) -> int:
    return _repeats_of_folder(path.parent) if path.parent != folder else 1


def _about_repeats(folder: Path, pictures: list[Path]) -> list[Issue]:
    return [
        Issue(
            relative(parent, folder),
            "note",
            f"Its name asks for {repeats} repeats of each picture in it: done.",
        )
        for parent in dict.fromkeys(path.parent for path in pictures)
        if parent != folder and (repeats := _repeats_of_folder(parent)) > 1
    ]


def _nothing_usable(folder: Path, findings: list[Issue]) -> str:
    reasons = [finding for finding in findings if finding.level == "error"]
    if not reasons:
        return f"{shown(folder)} holds no pictures: put JPEG, PNG or WebP files into it."
    listed = "; ".join(f"{finding.file}: {finding.message.rstrip('.')}" for finding in reasons[:5])
    more = f"; and {len(reasons) - 5} more" if len(reasons) > 5 else ""
    return f"{shown(folder)} holds no usable picture. {listed}{more}."


def with_trigger(caption: str, trigger: str) -> str:
    if not trigger or checks.has_word(caption, trigger):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def held_out_count(run: RunConfig, images: int) -> int:
    """Returns how many of so many images are held out for validation."""
    return round(images * run.dataset.hold_out) if images >= SMALLEST_SET_TO_HOLD_OUT else 0


def resolutions(run: RunConfig) -> tuple[int, ...]:
    """Returns the resolutions at which each image is trained, in pixels."""
    return run.dataset.resolution, *run.dataset.resolutions

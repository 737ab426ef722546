"""A folder of pictures and captions, read: what is trained on, and one finding for everything that is odd or left out.

It never changes the folder, and never leaves anything out without naming it.
"""

import os
import re
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from trainer import config
from trainer.config import folder_repeats
from trainer.data import checks, crops, token_count
from trainer.data.buckets import Crop, choose_crop, whole_picture
from trainer.data.captions import (
    METADATA_NAME,
    Metadata,
    caption_candidates,
    caption_of,
    relative,
    stem_of,
    suffix_of,
)
from trainer.data.image_stats import inspect_all
from trainer.data.images import IMAGE_SUFFIXES, shown
from trainer.data.issues import OWN_FOLDER, Issue, Level
from trainer.errors import DatasetError

MAX_REPEATS = 200  # `2024_holiday` is a date
MASK_ENDINGS = (".mask.png", "-masklabel.png")  # the second is OneTrainer's
MASK_FOLDER = "masks"
OTHER_IMAGE_SUFFIXES = frozenset((
    ".jp2", ".j2k", ".jxl", ".psd", ".xcf", ".svg", ".eps", ".pdf", ".ico", ".tga", ".exr", ".hdr", ".ppm", ".pcx",
    ".dds", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2",
))  # fmt: skip
JUNK_NAMES = frozenset(
    ("thumbs.db", "desktop.ini", ".ds_store", "__macosx", "ehthumbs.db", "icon\r")
)


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
    crop_centre: crops.Centre | None = None
    """Where a person moved its crop to."""


def is_junk(name: str) -> bool:
    """Whether an operating system, not a person, put the file there."""
    return name.startswith("._") or name.lower() in JUNK_NAMES


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
    files = _walk(folder, findings)
    pictures, masks = pair_masks(path for path in files if suffix_of(path.name) in IMAGE_SUFFIXES)
    metadata = Metadata(folder, findings)
    findings += _about_other_files(
        folder, files, set(pictures), set(masks.values()), metadata
    ) + _about_case_twins(folder, pictures)

    items: list[DatasetItem] = []
    used, captioned, moved = [], set(), crops.read(folder)
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


# Walking


def _walk(folder: Path, findings: list[Issue]) -> list[Path]:
    """All files to look at, sorted. Links to folders are not entered, so loops end; all passed over are findings."""
    root, files, waiting = folder.resolve(), [], [folder]

    def skip(path: Path, message: str, level: Level = "note") -> None:
        findings.append(Issue(relative(path, folder), level, message))

    while waiting:
        parent = waiting.pop()
        try:
            entries = sorted(os.scandir(parent), key=lambda entry: entry.name)
        except OSError as error:
            skip(
                parent,
                f"The folder cannot be read ({error.strerror}): what is in it was left out.",
                "warning",
            )
            continue
        for entry in entries:
            path = parent / entry.name
            is_picture = suffix_of(entry.name) in IMAGE_SUFFIXES
            if is_junk(entry.name):
                skip(path, "Was put there by the operating system: ignored.")
            elif entry.is_dir(follow_symlinks=False):
                if entry.name.startswith("."):
                    if entry.name != OWN_FOLDER:
                        skip(path, "Is a hidden folder: ignored.")
                    continue
                if is_picture:
                    skip(
                        path,
                        "Is a folder named like a picture: only what is inside it is used.",
                        "warning",
                    )
                waiting.append(path)
            elif entry.is_symlink() and entry.is_dir():
                skip(
                    path,
                    "Is a link to a folder, which is not followed: copy the folder itself.",
                    "warning",
                )
            elif entry.is_symlink() and is_picture and not _leads_inside(path, root):
                skip(
                    path,
                    "Is a link that leaves the dataset: it was left out; copy the picture itself.",
                    "error",
                )
            elif entry.name.startswith(".") and not is_picture:
                skip(path, "Is a hidden file: ignored.")
            else:
                files.append(path)
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def files_of(folder: Path) -> list[Path]:
    """All files that a scan looks at, sorted."""
    return _walk(folder, [])


def pair_masks(files: Iterable[Path]) -> tuple[list[Path], dict[Path, Path]]:
    """Pictures, and the mask of each that has one: `<stem>.mask.png`, `<stem>-masklabel.png` or `masks/<stem>.png` beside it.

    A mask is no picture to train on. One of the first two kinds without its picture is in neither.
    """
    named, others = {}, []
    for path in files:
        ending = next(
            (ending for ending in MASK_ENDINGS if path.name.lower().endswith(ending)), None
        )
        if ending is None:
            others.append(path)
        else:
            named[path.with_name(path.name[: -len(ending)])] = path
    stems = {stem_of(path) for path in others if path.parent.name.lower() != MASK_FOLDER}
    pictures = []
    for path in others:
        stem = path.parent.parent / stem_of(path).name
        if path.parent.name.lower() == MASK_FOLDER and stem in stems:
            named.setdefault(stem, path)
        else:
            pictures.append(path)
    return pictures, {path: named[stem_of(path)] for path in pictures if stem_of(path) in named}


def _leads_inside(link: Path, root: Path) -> bool:
    try:
        return link.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):  # leads nowhere, or in a circle
        return False


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

"""Fixes: edits that remove an issue with one click, and that `history` can undo.

A fix never loses an original: `history` keeps what it replaces or removes.
"""

import io
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.curation import caption_edits, history
from trainer.curation.history import Edit
from trainer.data import token_count
from trainer.data.captions import MetadataCaptions, caption_of
from trainer.data.dataset_files import (
    MASK_ENDINGS,
    caption_candidates,
    caption_path,
    files_of,
    is_image,
    pair_masks,
    relative,
    stem_of,
)
from trainer.data.images import alpha_mask, decode_image, image_format, read_image
from trainer.data.issue import Issue
from trainer.errors import DatasetError

SUFFIX_FOR_FORMAT = {
    "JPEG": ".jpg",
    "MPO": ".jpg",
    "PNG": ".png",
    "WEBP": ".webp",
    "BMP": ".bmp",
    "TIFF": ".tif",
    "GIF": ".gif",
    "AVIF": ".avif",
    "HEIF": ".heic",
}
CAMERA_WORDS = re.compile(
    r"\b(img|dsc\w?|pxl|image|picture|photo|screenshot|untitled|file|copy|whatsapp|signal)\b",
    re.IGNORECASE,
)
"""Words of file names that do not describe the image."""


@dataclass(frozen=True)
class Fix:
    """A named fix. `FIXES_FOR_KIND` lists the issues that it is for."""

    label: str
    """The text of its button."""
    edits: Callable[["_Dataset", Path, Issue], list[Edit]]
    """Returns the edits for one issue and its file."""
    for_each: bool = True
    """Applies to the file of each issue. If False, applies once to the whole dataset."""


class _Dataset:
    """The files of a dataset, read once for all issues."""

    def __init__(
        self, path: Path, tokenizer: Path | None = None, limit: int = token_count.LIMIT
    ) -> None:
        self.path, self.limit = path, limit
        self.count = token_count.counter(tokenizer)
        files = files_of(path)
        self.by_name = {relative(file, path): file for file in files}
        self.images, self.masks = pair_masks(file for file in files if is_image(file))
        self.stem_counts = Counter(map(stem_of, self.images))
        self.metadata = MetadataCaptions(path)

    def caption(self, image: Path) -> str:
        return caption_of(image, self.path, self.metadata, separate_lines=True)[0]

    def companions(self, image: Path) -> list[Path]:
        """Returns the captions and the mask of an image, unless another image shares its stem."""
        if self.stem_counts[stem_of(image)] > 1:
            return []
        by_name = {
            path.name.lower(): path
            for path in caption_candidates(image)
            if path.is_file() and not path.is_symlink()
        }
        mask = self.masks.get(image)
        return [*by_name.values(), *([mask] if mask else [])]


# Applying a fix


def apply(
    dataset: Path,
    issues: Sequence[Issue],
    name: str,
    tokenizer: Path | None = None,
    limit: int = token_count.LIMIT,
) -> int:
    """Applies a fix to the files of these issues, as one change in the history.

    Returns the number of files that changed. Issues that the fix is not for are skipped. `limit`
    is `dataset.caption_tokens`. Raises `DatasetError` if the fix is unknown or changes nothing.
    """
    if name not in FIXES:
        raise DatasetError(f"Unknown fix {name}: choose one of {', '.join(FIXES)}.")
    fix, files = FIXES[name], _Dataset(Path(dataset), tokenizer, limit)
    edits: dict[Path, Edit] = {}
    for issue in issues:
        if name not in FIXES_FOR_KIND.get(issue.kind, ()):
            continue
        path = files.by_name.get(issue.file) if fix.for_each else files.path
        if path is None:
            continue  # the file was removed since
        for edit in fix.edits(files, path, issue):
            edits.setdefault(edit.path, edit)
    changed = 0
    if edits:
        label = f"{fix.label}: {_count_files(edits)}"
        changed = history.apply(files.path, label, list(edits.values()))
    if not changed:
        raise DatasetError(f"“{fix.label}” changes nothing here.")
    return changed


def _count_files(paths: Collection[Path]) -> str:
    return next(iter(paths)).name if len(paths) == 1 else f"{len(paths)} files"


def exclude(dataset: Path, images: Sequence[Path]) -> list[Edit]:
    """Returns the edits that remove images, with their captions and masks, from a dataset."""
    files = _Dataset(dataset)
    edits = []
    for image in images:
        edits += [Edit(path, None) for path in (image, *files.companions(image))]
    return edits


# The edits of each fix


def _exclude(files: _Dataset, path: Path, issue: Issue) -> list[Edit]:
    companions = files.companions(path) if path in files.images else []
    return [Edit(other, None) for other in (path, *companions)]


def _reencode(files: _Dataset, path: Path, issue: Issue) -> list[Edit]:
    """Saves the image as it is trained, upright 8-bit RGB, as PNG."""
    image, _ = decode_image(read_image(path), path)
    encoded = io.BytesIO()
    image.save(encoded, "PNG", optimize=True)
    return _renamed(files, path, f"{stem_of(path).name}.png", encoded.getvalue())


def _rename(files: _Dataset, path: Path, issue: Issue) -> list[Edit]:
    data = read_image(path)
    suffix = SUFFIX_FOR_FORMAT[image_format(data, path)]
    return _renamed(files, path, path.name.rstrip(".") + suffix, data)


def _renamed(files: _Dataset, path: Path, name: str, data: bytes) -> list[Edit]:
    """Replaces an image by one of another name, with the caption of the old one."""
    target = path.with_name(name)
    if target == path:
        return [Edit(path, data)]
    if target.exists():
        raise DatasetError(f"{name} already exists: rename one of the two, then try again.")
    edits = [Edit(path, None), Edit(target, data)]
    caption = files.caption(path)
    if caption and not caption_path(target).exists():
        edits.append(Edit(caption_path(target), caption.encode()))
    return edits


def _caption_from_name(files: _Dataset, path: Path, issue: Issue) -> list[Edit]:
    """Captions "old_red-boat 3.jpg" with "old red boat", but no name that a camera chose."""
    words = CAMERA_WORDS.sub(" ", re.sub(r"[\W\d_]+", " ", stem_of(path).name))
    caption = " ".join(words.split())
    return [caption_edits.caption_edit(path, caption)] if len(caption) > 2 else []


def _shorten(files: _Dataset, path: Path, issue: Issue) -> list[Edit]:
    changes = caption_edits.plan(
        [(path, files.caption(path))],
        lambda line: shortened(line, files.count, files.limit),
    )
    return caption_edits.edits(changes)


def shortened(line: str, count: token_count.Counter, limit: int) -> str:
    """Cuts a line at the last comma or full stop within the limit, or else at the last space."""
    if count([line])[0] <= limit:
        return line
    ends = [match.start() for match in re.finditer(r"[,.;](?=\s|$)", line)]
    ends = ends or [match.start() for match in re.finditer(r"\s", line)]
    low, high = 0, len(ends)
    while low < high:  # bisect for the longest beginning that fits
        middle = (low + high) // 2
        if count([line[: ends[middle]]])[0] <= limit:
            low = middle + 1
        else:
            high = middle
    return line[: ends[low - 1]].strip() if low else line


def _save_as_utf8(files: _Dataset, path: Path, issue: Issue) -> list[Edit]:
    if is_image(path):  # the issue names the image if its caption is in metadata.jsonl
        return [caption_edits.caption_edit(path, files.caption(path))]
    image = next(image for image in files.images if path in caption_candidates(image))
    return [Edit(path, files.caption(image).encode())]


def _add_trigger(files: _Dataset, path: Path, issue: Issue) -> list[Edit]:
    add = caption_edits.prepend(f"{issue.detail},")
    return caption_edits.edits(caption_edits.plan([(path, files.caption(path))], add))


def _remove_tag(files: _Dataset, path: Path, issue: Issue) -> list[Edit]:
    captions = [(image, files.caption(image)) for image in files.images]
    remove = caption_edits.remove_tag(issue.detail)
    return caption_edits.edits(caption_edits.plan(captions, remove))


def _mask_from_alpha(files: _Dataset, path: Path, issue: Issue) -> list[Edit]:
    mask = alpha_mask(path)
    if mask is None or path in files.masks:
        return []
    encoded = io.BytesIO()
    mask.save(encoded, "PNG", optimize=True)
    target = stem_of(path).with_name(stem_of(path).name + MASK_ENDINGS[0])
    return [Edit(target, encoded.getvalue())]


# The tables

FIXES = {
    "exclude": Fix("Leave out", _exclude),
    "reencode": Fix("Save as a plain PNG", _reencode),
    "rename": Fix("Add the file extension", _rename),
    "caption-from-name": Fix("Use the file name as caption", _caption_from_name),
    "shorten": Fix("Cut after the last part that is read", _shorten),
    "utf8": Fix("Save as clean UTF-8", _save_as_utf8),
    "add-trigger": Fix("Write the trigger word into the captions", _add_trigger),
    "remove-tag": Fix("Remove the tag everywhere", _remove_tag, for_each=False),
    "mask-from-alpha": Fix("Make a mask from the transparency", _mask_from_alpha),
}

FIXES_FOR_KIND: dict[str, tuple[str, ...]] = {
    "unreadable": ("exclude",),
    "misnamed": ("rename", "exclude"),
    "duplicate": ("exclude",),
    "near-duplicate": ("exclude",),
    "small": ("exclude",),
    "narrow": ("exclude",),
    "blurred": ("exclude",),
    "flat": ("exclude",),
    "animated": ("reencode", "exclude"),
    "odd-picture": ("exclude", "reencode"),
    "rotated": ("reencode",),
    "transparent": ("mask-from-alpha", "reencode"),
    "converted": ("reencode",),
    "no-caption": ("caption-from-name", "exclude"),
    "long-caption": ("shorten",),
    "odd-caption": ("utf8",),
    "unread-caption": ("exclude",),
    "several-captions": ("exclude",),
    "orphan": ("exclude",),
    "no-trigger": ("add-trigger",),
    "shared-tag": ("remove-tag",),
}
"""The fixes for each kind of issue. `check --fix KIND` applies the first one."""

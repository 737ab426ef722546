"""What can be done about a finding, with one click: each cure is a list of edits, and the journal can take all of them back.

A cure never alters an original: what it replaces or takes away is kept in the journal of the dataset.
"""

import io
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.curation import caption_edits, history
from trainer.curation.history import Edit
from trainer.data import token_count
from trainer.data.captions import Metadata, caption_of
from trainer.data.dataset_files import (
    caption_candidates,
    caption_path,
    files_of,
    pair_masks,
    relative,
    stem_of,
    suffix_of,
)
from trainer.data.image_formats import IMAGE_SUFFIXES
from trainer.data.images import alpha_mask, decode_image, image_format, read_image
from trainer.data.issues import Issue
from trainer.errors import DatasetError

SUFFIX_OF_FORMAT = {
    "JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif", "GIF": ".gif", "AVIF": ".avif",
    "HEIF": ".heic",
}  # fmt: skip
CAMERA_WORDS = re.compile(
    r"\b(img|dsc\w?|pxl|image|picture|photo|screenshot|untitled|file|copy|whatsapp|signal)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Fix:
    label: str
    """What its button says."""
    edits: Callable[["_Folder", Path, Issue], list[Edit]]
    for_each: bool = True
    """Applied to the file of the finding; else once, to the whole dataset."""


def apply(
    dataset: Path,
    findings: Sequence[Issue],
    name: str,
    tokenizer: Path | None = None,
    limit: int = token_count.LIMIT,
) -> int:
    """Applies a cure to the files of these findings, as one change of the journal. Returns the number of files that changed.

    Findings of kinds that the cure is not for are passed over. Raises `DatasetError` where there is no such cure, or nothing to cure.
    """
    if name not in FIXES:
        raise DatasetError(f"There is no cure named {name}; there are {', '.join(FIXES)}.")
    cure, folder = FIXES[name], _Folder(Path(dataset), tokenizer, limit)
    edits: dict[Path, Edit] = {}
    for finding in findings:
        if name not in FIXES_FOR_KIND.get(finding.kind, ()):
            continue
        path = folder.by_name.get(finding.file, folder.path) if cure.for_each else folder.path
        if cure.for_each and path == folder.path:
            continue  # it is gone already
        for edit in cure.edits(folder, path, finding):
            edits.setdefault(edit.path, edit)
    changed = (
        history.apply(folder.path, f"{cure.label}: {_files(edits)}", list(edits.values()))
        if edits
        else 0
    )
    if not changed:
        raise DatasetError(f"“{cure.label}” changes nothing here.")
    return changed


def _files(edits: Sequence[Path] | dict[Path, Edit]) -> str:
    names = [path.name for path in edits]
    return names[0] if len(names) == 1 else f"{len(names)} files"


class _Folder:
    """A dataset as the cures see it."""

    def __init__(self, path: Path, tokenizer: Path | None = None, limit: int = token_count.LIMIT):
        self.path, self.limit = path, limit
        self.count = token_count.counter(tokenizer)
        self.files = files_of(path)
        self.by_name = {relative(file, path): file for file in self.files}
        self.pictures, self.masks = pair_masks(
            file for file in self.files if suffix_of(file.name) in IMAGE_SUFFIXES
        )
        self.stems = Counter(map(stem_of, self.pictures))
        self.metadata = Metadata(path, [])

    def caption(self, picture: Path) -> str:
        return caption_of(picture, self.path, self.metadata, separate_lines=True)[0]

    def companions(self, picture: Path) -> list[Path]:
        """Its captions and its mask, unless another picture has the same stem."""
        if self.stems[stem_of(picture)] > 1:
            return []
        found = {
            path.name.lower(): path
            for path in caption_candidates(picture)
            if path.is_file() and not path.is_symlink()
        }
        return [*found.values(), *([self.masks[picture]] if picture in self.masks else [])]


def exclude(dataset: Path, pictures: Sequence[Path]) -> list[Edit]:
    """Edits that take pictures, with their captions and masks, out of a dataset."""
    folder = _Folder(dataset)
    return [
        Edit(path, None) for picture in pictures for path in (picture, *folder.companions(picture))
    ]


def _exclude(folder: _Folder, path: Path, finding: Issue) -> list[Edit]:
    companions = folder.companions(path) if path in folder.pictures else []
    return [Edit(other, None) for other in (path, *companions)]


def _reencode(folder: _Folder, path: Path, finding: Issue) -> list[Edit]:
    """The picture as it is trained, upright 8-bit RGB, saved as PNG; its caption comes along."""
    image, _ = decode_image(read_image(path), path)
    encoded = io.BytesIO()
    image.save(encoded, "PNG", optimize=True)
    return _renamed(folder, path, stem_of(path).name + ".png", encoded.getvalue())


def _rename(folder: _Folder, path: Path, finding: Issue) -> list[Edit]:
    data = read_image(path)
    return _renamed(
        folder, path, path.name.rstrip(".") + SUFFIX_OF_FORMAT[image_format(data, path)], data
    )


def _renamed(folder: _Folder, path: Path, name: str, data: bytes) -> list[Edit]:
    target = path.with_name(name)
    if target == path:
        return [Edit(path, data)]
    if target.exists():
        raise DatasetError(f"{name} is there already: rename one of the two, then try again.")
    caption = folder.caption(path)
    kept = (
        [Edit(caption_path(target), caption.encode())]
        if caption and not caption_path(target).exists()
        else []
    )
    return [Edit(path, None), Edit(target, data), *kept]


def _caption_from_name(folder: _Folder, path: Path, finding: Issue) -> list[Edit]:
    """ "old_red-boat 3.jpg" says "old red boat"; what a camera wrote says nothing."""
    words = CAMERA_WORDS.sub(" ", re.sub(r"[\W\d_]+", " ", stem_of(path).name))
    words = " ".join(words.split())
    return [caption_edits.caption_edit(path, words)] if len(words) > 2 else []


def _shorten(folder: _Folder, path: Path, finding: Issue) -> list[Edit]:
    """Each line up to the last comma or full stop that the text encoder still reads."""

    def shorter(line: str) -> str:
        if folder.count([line])[0] <= folder.limit:
            return line
        ends = [found.start() for found in re.finditer(r"[,.;](?=\s|$)", line)] or [
            found.start() for found in re.finditer(r"\s", line)
        ]
        low, high = 0, len(ends)
        while low < high:  # the longest beginning that fits, by halving
            middle = (low + high) // 2
            fits = folder.count([line[: ends[middle]]])[0] <= folder.limit
            low, high = (middle + 1, high) if fits else (low, middle)
        return line[: ends[low - 1]].strip() if low else line

    return caption_edits.edits(caption_edits.plan([(path, folder.caption(path))], shorter))


def _as_utf8(folder: _Folder, path: Path, finding: Issue) -> list[Edit]:
    if suffix_of(path.name) in IMAGE_SUFFIXES:  # its caption is in metadata.jsonl
        return [caption_edits.caption_edit(path, folder.caption(path))]
    picture = next(picture for picture in folder.pictures if path in caption_candidates(picture))
    return [Edit(path, folder.caption(picture).encode())]


def _add_trigger(folder: _Folder, path: Path, finding: Issue) -> list[Edit]:
    return caption_edits.edits(
        caption_edits.plan(
            [(path, folder.caption(path))], caption_edits.prepend(finding.detail + ",")
        )
    )


def _remove_tag(folder: _Folder, path: Path, finding: Issue) -> list[Edit]:
    captions = [(picture, folder.caption(picture)) for picture in folder.pictures]
    return caption_edits.edits(
        caption_edits.plan(captions, caption_edits.remove_tag(finding.detail))
    )


def _mask_from_alpha(folder: _Folder, path: Path, finding: Issue) -> list[Edit]:
    mask = alpha_mask(path)
    if mask is None or path in folder.masks:
        return []
    encoded = io.BytesIO()
    mask.save(encoded, "PNG", optimize=True)
    return [Edit(stem_of(path).with_name(stem_of(path).name + ".mask.png"), encoded.getvalue())]


FIXES = {
    "exclude": Fix("Leave out", _exclude),
    "reencode": Fix("Save as a plain PNG", _reencode),
    "rename": Fix("Give it its ending", _rename),
    "caption-from-name": Fix("Take the file's name as caption", _caption_from_name),
    "shorten": Fix("Cut after the last part that is read", _shorten),
    "utf8": Fix("Save as clean UTF-8", _as_utf8),
    "add-trigger": Fix("Write the trigger word into the captions", _add_trigger),
    "remove-tag": Fix("Remove the tag everywhere", _remove_tag, for_each=False),
    "mask-from-alpha": Fix("Make a mask of what is not transparent", _mask_from_alpha),
}
# The first cure of a kind is the one that `--fix KIND` takes.
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

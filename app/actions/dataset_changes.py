"""What a person can change in a dataset: captions, fixes, crops and masks. Undo takes it back."""

import base64
import binascii
from pathlib import Path

from app.actions import dataset_images, dataset_scans, datasets
from app.actions.dataset_view import undo_label
from app.actions.records import (
    BrowserData,
    ChangeCount,
    EditPreview,
    MovedCrop,
    RemovedImage,
    SavedCaption,
    SavedMask,
    Undone,
)
from trainer.curation import caption_edits, crop_edits, fixes, history
from trainer.curation.history import Edit
from trainer.data import captions, dataset_files, images, token_count
from trainer.errors import DatasetError

MAX_CHANGES = 12
"""How many changes a preview shows."""
MAX_MASK_BYTES = 2**21
MAX_SHAPE_DIFFERENCE = 0.02
"""By which share the shape of a mask may differ from its image."""


# Captions


def save_caption(data: BrowserData) -> SavedCaption:
    """Writes the "caption" of an image. Raises DatasetError if it is too long."""
    image = datasets.resolve_image(data.get("dataset"), data.get("file"))
    folder = datasets.resolve(data.get("dataset"))
    file, text = str(data.get("file")), str(data.get("caption", ""))
    if len(text.encode("utf-8", "replace")) > captions.MAX_CAPTION_BYTES:
        limit = captions.MAX_CAPTION_BYTES >> 20
        raise DatasetError(f"A caption may have {limit} MB at most; shorten it.")
    # While a person types, all saves of a caption are one entry of the history.
    edit = caption_edits.caption_edit(image, text)
    history.apply(folder, f"The caption of {file}", [edit], merge=f"caption {file}")
    caption = captions.read_caption(image, separate_lines=True)[0]
    current = dataset_scans.scans.get(folder)
    if current is not None:
        current.captions[file] = caption
    _, base = dataset_scans.settings_of(data)
    count_tokens = token_count.counter(dataset_scans.tokenizer_of(base))
    return {
        "caption": caption,
        "tokens": count_tokens([caption])[0],
        "undo": undo_label(folder),
    }


def preview_edit(data: BrowserData) -> EditPreview:
    """Returns what a change of all captions would do, without doing it."""
    folder, changes = _planned(data)
    return {
        "count": len(changes),
        "changes": [
            {
                "file": dataset_files.relative(change.image, folder),
                "before": change.before,
                "after": change.after,
            }
            for change in changes[:MAX_CHANGES]
        ],
    }


def apply_edit(data: BrowserData) -> ChangeCount:
    """Changes all captions. Raises DatasetError for an unknown operation."""
    folder, changes = _planned(data)
    on_disk = dataset_scans.read_captions(folder, (change.image for change in changes))
    if list(on_disk.values()) != [change.before for change in changes]:
        # Another program wrote captions since the scan. They are changed too, not replaced.
        dataset_scans.scan(data)
        folder, changes = _planned(data)
    label = f"Changed {len(changes)} captions"
    return {"changed": history.apply(folder, label, caption_edits.edits(changes))}


def _planned(data: BrowserData) -> tuple[Path, list[caption_edits.Change]]:
    folder = datasets.resolve(data.get("dataset"))
    current = dataset_scans.finished_scan(data, again=False)
    known = []
    for item in current.items:
        file = dataset_files.relative(item.path, folder)
        known.append((item.path, current.captions.get(file, "")))
    return folder, caption_edits.plan(known, _operation(data), str(data.get("only") or ""))


def _operation(data: BrowserData) -> caption_edits.Operation:
    text = str(data.get("text") or "")
    find = str(data.get("find") or "")
    replacement = str(data.get("replacement") or "")
    match data.get("operation"):
        case "prepend":
            return caption_edits.prepend(text)
        case "append":
            return caption_edits.append(text)
        case "replace":
            return caption_edits.replace(find, replacement, bool(data.get("pattern")))
        case "rename":
            return caption_edits.rename_tag(find, replacement)
        case "remove":
            return caption_edits.remove_tag(find)
        case "sort":
            return caption_edits.sort_tags(1 if data.get("keep_first") else 0)
        case "deduplicate":
            return caption_edits.deduplicate
    raise DatasetError("There is no such change; reload the page.")


# Fixes and undo


def cure(data: BrowserData) -> ChangeCount:
    """Applies the fix named "cure" to all issues of a "kind", or only to the issue of a "file"."""
    folder = datasets.resolve(data.get("dataset"))
    current = dataset_scans.finished_scan(data)
    kind, file = data.get("kind"), data.get("file")
    issues = [
        issue for issue in current.issues if issue.kind == kind and file in (None, issue.file)
    ]
    changed = fixes.apply(
        folder,
        issues,
        str(data.get("cure")),
        current.tokenizer,
        current.settings.caption_tokens,
    )
    return {"changed": changed}


def undo(data: BrowserData) -> Undone:
    """Takes the last change back, except in files that another program has changed since."""
    label, kept = history.undo(datasets.resolve(data.get("dataset")))
    return {"label": label, "kept": kept}


def remove_picture(data: BrowserData) -> RemovedImage:
    """Removes an image, its captions and its mask."""
    image = datasets.resolve_image(data.get("dataset"), data.get("file"))
    folder = datasets.resolve(data.get("dataset"))
    history.apply(folder, f"Removed {image.name}", fixes.exclude(folder, [image]))
    return {"ok": True, "undo": undo_label(folder)}


# Crops and masks


def move_crop(data: BrowserData) -> MovedCrop:
    """Moves the crop of an image to a "centre" [x, y], or without one resets it to the crop mode.

    Raises DatasetError if the centre is not two numbers from 0 to 1.
    """
    image = datasets.resolve_image(data.get("dataset"), data.get("file"))
    folder = datasets.resolve(data.get("dataset"))
    edit = crop_edits.move(folder, image, data.get("centre"))
    history.apply(folder, f"Moved the crop of {image.name}", [edit], merge=f"crop {image.name}")
    current = dataset_scans.finished_scan(data)
    item = next(item for item in current.items if item.path == image)
    return {**datasets.crop_view(item, current.settings), "undo": undo_label(folder)}


def save_mask(data: BrowserData) -> SavedMask:
    """Writes a painted "mask" (a PNG in base64) for an image, or without one removes its mask."""
    if data.get("mask"):
        return put_mask(data, _decoded_mask(str(data["mask"])), Path("mask.png"))
    image = datasets.resolve_image(data.get("dataset"), data.get("file"))
    folder = datasets.resolve(data.get("dataset"))
    paths = [path for path in dataset_files.files_of(folder) if dataset_files.is_image(path)]
    _, masks = dataset_files.pair_masks(paths)
    removal = [Edit(masks[image], None)] if image in masks else []
    history.apply(folder, f"Removed the mask of {image.name}", removal)
    return {"mask": "", "undo": undo_label(folder)}


def _decoded_mask(text: str) -> bytes:
    try:
        content = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        raise DatasetError("The mask did not arrive completely; save it again.") from None
    if len(content) > MAX_MASK_BYTES:
        raise DatasetError(
            "The mask is too large; paint it with fewer details, or upload it as a file."
        )
    return content


def put_mask(data: BrowserData, content: bytes, name: Path) -> SavedMask:
    """Writes an image as the mask of the image "file".

    Args:
        data: The request of a script, with the dataset and the file.
        content: The file of the mask, in any format of images.
        name: The name of this file, for error messages.

    Raises DatasetError if the mask does not have the shape of the image.
    """
    image = datasets.resolve_image(data.get("dataset"), data.get("file"))
    folder = datasets.resolve(data.get("dataset"))
    stem = dataset_files.stem_of(image)
    target = stem.with_name(stem.name + dataset_files.MASK_ENDINGS[0])
    mask = images.grey_png(content, name)
    width, height = images.image_size(image)
    mask_width, mask_height = images.decode_image(mask, name)[0].size
    shape = width / height
    if abs(shape - mask_width / mask_height) > MAX_SHAPE_DIFFERENCE * width / height:
        raise DatasetError(
            f"The mask ({mask_width} x {mask_height}) does not have the shape "
            f"of the image ({width} x {height})."
        )
    history.apply(folder, f"The mask of {image.name}", [Edit(target, mask)])
    key = dataset_images.key_of(image.relative_to(folder).as_posix())
    url = dataset_images.mask_url(data.get("dataset"), key, target)
    return {"mask": url, "undo": undo_label(folder)}

"""The files of a dataset by their names: images, captions, masks, and files to ignore."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from trainer.data.image_formats import IMAGE_SUFFIXES
from trainer.data.issue import Issue, Level, printable

OWN_FOLDER = ".atelier"
"""Folder in a dataset for this program's own files (crops, history). Scans ignore it."""

CAPTION_SUFFIXES = (".txt", ".TXT", ".caption", ".CAPTION")  # an earlier one wins
METADATA_NAME = "metadata.jsonl"  # one JSON object per line, as in a Hugging Face "imagefolder"

MASK_ENDINGS = (".mask.png", "-masklabel.png")  # the second is OneTrainer's
MASK_FOLDER = "masks"

OTHER_IMAGE_SUFFIXES = frozenset((
    ".jp2", ".j2k", ".jxl", ".psd", ".xcf", ".svg", ".eps", ".pdf", ".ico", ".tga", ".exr", ".hdr",
    ".ppm", ".pcx", ".dds", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2",
))  # fmt: skip
"""Images that are never decoded (see `image_formats`)."""

JUNK_NAMES = frozenset((
    "thumbs.db", "desktop.ini", ".ds_store", "__macosx", "ehthumbs.db", "icon\r",
))  # fmt: skip


# Names


def suffix_of(name: str) -> str:
    """Returns the extension in lower case with its dot, or "" for a name such as ".png"."""
    stem, _, extension = name.rpartition(".")
    return f".{extension.lower()}" if stem and extension else ""


def stem_of(image: Path) -> Path:
    """Returns the path of an image without its extension. Its caption and mask share this stem."""
    return image.with_name(image.name[: len(image.name) - len(suffix_of(image.name))])


def relative(path: Path, folder: Path) -> str:
    """Returns the path relative to the dataset, made printable, as in `Issue.file`."""
    return printable(path.relative_to(folder).as_posix())


def caption_path(image: Path) -> Path:
    """Returns the file that an edited caption is saved to: `<stem>.txt` beside the image."""
    return image.with_name(f"{stem_of(image).name}.txt")


def caption_candidates(image: Path) -> list[Path]:
    """Returns the files that may hold an image's caption, in order of precedence."""
    stem = stem_of(image).name
    names = [stem + suffix for suffix in CAPTION_SUFFIXES]
    return [image.with_name(name) for name in (*names, f"{image.name}.txt")]


def is_junk(name: str) -> bool:
    """Returns whether an operating system, not a person, created the file."""
    return name.startswith("._") or name.lower() in JUNK_NAMES


def is_image(path: Path) -> bool:
    """Returns whether the name is an image's."""
    return suffix_of(path.name) in IMAGE_SUFFIXES


# Walking the folder


def files_of(folder: Path) -> list[Path]:
    """Returns all files that a scan reads, sorted by relative path."""
    return walk(folder, [])


def walk(folder: Path, issues: list[Issue]) -> list[Path]:
    """Returns all files that a scan reads, sorted, and adds an issue for each file it ignores.

    Links to folders are not followed, so a loop of links ends.
    """
    root = folder.resolve()
    files: list[Path] = []
    waiting = [folder]
    while waiting:
        parent = waiting.pop()
        try:
            entries = sorted(os.scandir(parent), key=lambda entry: entry.name)
        except OSError as error:
            message = f"The folder cannot be read ({error.strerror}): its files are left out."
            issues.append(Issue(relative(parent, folder), "warning", message))
            continue
        for entry in entries:
            path = parent / entry.name
            reason = _reason_to_ignore(entry, path, root)
            if reason is not None:
                level, message = reason
                issues.append(Issue(relative(path, folder), level, message))
            elif not entry.is_dir(follow_symlinks=False):
                files.append(path)
            elif not entry.name.startswith("."):
                waiting.append(path)
                issues += _about_folder(path, folder)
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def _reason_to_ignore(entry: os.DirEntry[str], path: Path, root: Path) -> tuple[Level, str] | None:
    """Returns the level and message for an entry that is ignored, or None.

    The program's own folder is ignored too, but without a message.
    """
    if is_junk(entry.name):
        return "note", "The operating system created this file: ignored."
    is_hidden = entry.name.startswith(".")
    if entry.is_dir(follow_symlinks=False):
        if is_hidden and entry.name != OWN_FOLDER:
            return "note", "The folder is hidden: ignored."
        return None
    if entry.is_symlink() and entry.is_dir():
        return "warning", "A link to a folder is not followed: copy the folder itself."
    if entry.is_symlink() and is_image(path) and not _leads_inside(path, root):
        return "error", "A link that leaves the dataset is left out: copy the image itself."
    if is_hidden and not is_image(path):
        return "note", "The file is hidden: ignored."
    return None


def _about_folder(path: Path, folder: Path) -> list[Issue]:
    if not is_image(path):
        return []
    message = "The folder is named like an image: only the files in it are used."
    return [Issue(relative(path, folder), "warning", message)]


def _leads_inside(link: Path, root: Path) -> bool:
    try:
        return link.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):  # the target is missing, or the links form a circle
        return False


# Masks


def pair_masks(files: Iterable[Path]) -> tuple[list[Path], dict[Path, Path]]:
    """Separates images from masks and returns the images and the mask of each that has one.

    A mask is `<stem>.mask.png`, `<stem>-masklabel.png` or `masks/<stem>.png` beside its image.
    A mask of the first two kinds is never trained on, even if its image is missing.
    """
    masks: dict[Path, Path] = {}  # by the stem of the image
    others: list[Path] = []
    for path in files:
        ending = mask_ending(path.name)
        if ending:
            masks[path.with_name(path.name[: -len(ending)])] = path
        else:
            others.append(path)

    stems = {stem_of(path) for path in others if path.parent.name.lower() != MASK_FOLDER}
    images = []
    for path in others:
        stem = path.parent.parent / stem_of(path).name
        if path.parent.name.lower() == MASK_FOLDER and stem in stems:
            masks.setdefault(stem, path)
        else:
            images.append(path)
    return images, {path: masks[stem_of(path)] for path in images if stem_of(path) in masks}


def mask_ending(name: str) -> str:
    """Returns the ending that marks a mask, in lower case, or ""."""
    return next((ending for ending in MASK_ENDINGS if name.lower().endswith(ending)), "")


# Files that are not used


def about_unused_files(
    folder: Path, files: list[Path], images: set[Path], masks: set[Path]
) -> list[Issue]:
    """Returns an issue for each file that is neither an image nor the caption or mask of one.

    Files that have nothing to do with images share one issue per suffix.
    """
    used = images | masks
    for image in images:
        used.update(caption_candidates(image))
    issues: list[Issue] = []
    strangers: dict[str, list[Path]] = {}
    for path in files:
        if path in used or path.name == METADATA_NAME:
            continue
        issue = _about_unused_file(path, relative(path, folder))
        if issue:
            issues.append(issue)
        else:
            strangers.setdefault(suffix_of(path.name), []).append(path)
    return [*issues, *_about_strangers(folder, strangers)]


def _about_unused_file(path: Path, file: str) -> Issue | None:
    suffix = suffix_of(path.name)
    if mask_ending(path.name):
        message = "The mask has no image of the same name: rename one of the two."
        return Issue(file, "warning", message, "orphan")
    if suffix in (".txt", ".caption"):
        message = "The caption has no image of the same name: rename one of the two."
        return Issue(file, "warning", message, "orphan")
    if suffix in OTHER_IMAGE_SUFFIXES:
        message = f"Images of this format ({suffix}) are left out: save it as JPEG or PNG."
        return Issue(file, "error", message, "unreadable")
    if _starts_like_image(path):
        message = (
            "The file looks like an image, but its name does not end in .jpg or similar, so it is "
            "left out: rename it."
        )
        return Issue(file, "error", message, "misnamed")
    return None


def _about_strangers(folder: Path, by_suffix: dict[str, list[Path]]) -> Iterator[Issue]:
    for suffix, paths in by_suffix.items():
        more = ""
        if len(paths) > 1:
            more = f" (and {len(paths) - 1} more {suffix or 'without extension'})"
        message = f"Not used: neither an image nor a caption{more}."
        yield Issue(relative(paths[0], folder), "note", message)


def _starts_like_image(path: Path) -> bool:
    try:
        if path.is_symlink() or not path.is_file():  # opening a pipe would block
            return False
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError:
        return False
    signatures = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*")
    return head.startswith(signatures) or head[8:12] in (b"WEBP", b"avif", b"heic")


def about_case_duplicates(folder: Path, images: list[Path]) -> list[Issue]:
    """Returns an issue for each image whose name differs from another's only in capitals.

    Of `DUP.png` and `dup.png` the one in capitals is named.
    """
    issues: list[Issue] = []
    first_with: dict[str, str] = {}
    for path in reversed(images):  # images are sorted, capitals first
        stem = stem_of(path).as_posix()
        if first_with.setdefault(stem.casefold(), stem) != stem:
            message = (
                "The name differs from another only in capitals: on Windows and macOS they share "
                "a caption. Rename one of the two."
            )
            issues.append(Issue(relative(path, folder), "warning", message, "case-twin"))
    return issues

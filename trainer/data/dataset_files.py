"""The names of the files in a dataset: images, captions, masks, and files to ignore."""

import os
from collections.abc import Iterable
from pathlib import Path

from trainer.data.image_formats import IMAGE_SUFFIXES
from trainer.data.issues import Issue, Level, shown

OWN_FOLDER = ".atelier"  # in a dataset: what this program keeps beside the pictures (crops, the journal); never read as pictures
CAPTION_SUFFIXES = (
    ".txt",
    ".TXT",
    ".caption",
    ".CAPTION",
)  # in this order; an edit is saved as .txt, so it wins
METADATA_NAME = "metadata.jsonl"  # one JSON object a line, as in a Hugging Face "imagefolder"
MASK_ENDINGS = (".mask.png", "-masklabel.png")  # the second is OneTrainer's
MASK_FOLDER = "masks"
OTHER_IMAGE_SUFFIXES = frozenset((
    ".jp2", ".j2k", ".jxl", ".psd", ".xcf", ".svg", ".eps", ".pdf", ".ico", ".tga", ".exr", ".hdr", ".ppm", ".pcx",
    ".dds", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2",
))  # fmt: skip
JUNK_NAMES = frozenset(
    ("thumbs.db", "desktop.ini", ".ds_store", "__macosx", "ehthumbs.db", "icon\r")
)


def suffix_of(name: str) -> str:
    """Lower-case extension with its dot, also of names that only consist of dots."""
    stem, _, extension = name.rpartition(".")
    return f".{extension.lower()}" if stem and extension else ""


def relative(path: Path, folder: Path) -> str:
    """The path below the dataset as it is shown, and as a finding names it."""
    return shown(path.relative_to(folder).as_posix())


def stem_of(picture: Path) -> Path:
    """The path of a picture without its extension, which its caption and its mask share."""
    return picture.with_name(picture.name[: len(picture.name) - len(suffix_of(picture.name))])


def caption_path(picture: Path) -> Path:
    """Where an edited caption of `picture` is saved: `<stem>.txt` beside it."""
    return picture.with_name(f"{stem_of(picture).name}.txt")


# Where it is


def caption_candidates(picture: Path) -> list[Path]:
    stem = stem_of(picture).name
    names = [stem + suffix for suffix in CAPTION_SUFFIXES] + [picture.name + ".txt"]
    return [picture.with_name(name) for name in names]


def is_junk(name: str) -> bool:
    """Whether an operating system, not a person, put the file there."""
    return name.startswith("._") or name.lower() in JUNK_NAMES


def walk(folder: Path, findings: list[Issue]) -> list[Path]:
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
    return walk(folder, [])


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

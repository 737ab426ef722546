"""The datasets of the page: folders below `outputs/datasets`, addressed by name, never by path.

Every name that comes from the browser goes through `resolve` or `resolve_picture`; what does not exist and
what is not allowed get the same answer.
"""

import hashlib
import os
import re
import shutil
from functools import lru_cache
from pathlib import Path

from trainer import buckets, captions, config, doctor, importing, pictures, run_folder
from trainer import dataset as reading
from trainer.errors import DatasetError
from trainer.findings import Finding

EXAMPLES = Path(reading.__file__).resolve().parent / "embedded" / "examples"
EXAMPLE_TITLES = {"subject": "A subject", "style": "A style", "photos": "Photographs"}
ORDINARY_WORDS = {
    "a",
    "an",
    "the",
    "one",
    "two",
    "some",
    "photo",
    "photograph",
    "picture",
    "image",
    "drawing",
    "painting",
    "of",
    "on",
    "in",
    "at",
    "with",
    "and",
    "by",
    "from",
    "style",
}
FEWEST_FOR_TRIGGER = 3


def root() -> Path:
    return run_folder.outputs_folder() / "datasets"


def names() -> list[str]:
    """All datasets, the one changed last first."""
    if not root().is_dir():
        return []
    folders = [folder for folder in root().iterdir() if folder.is_dir() and folder.name == run_folder.slug(folder.name)]
    return [folder.name for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True)]


def resolve(name: object) -> Path:
    """The folder of a dataset. Raises DatasetError for what is none."""
    folder = root() / str(name)
    if not isinstance(name, str) or run_folder.slug(name) != name or not folder.is_dir() or folder.is_symlink():
        raise DatasetError("There is no such dataset; choose one from the list.")
    return folder


def resolve_picture(name: object, file: object) -> Path:
    """A picture of a dataset by its path below the dataset's folder."""
    folder = resolve(name)
    path = folder / str(file)
    is_picture = isinstance(file, str) and path.suffix.lower() in pictures.PICTURE_SUFFIXES
    if not is_picture or not os.path.isfile(path) or not path.resolve().is_relative_to(folder.resolve()):
        raise DatasetError("There is no such picture in this dataset.")
    return path


def add(name: str, sources: list[Path], original_names: dict[Path, str]) -> tuple[str, list[Finding]]:
    """Copies dropped files into a dataset, which is made if it is new. Returns its name and what was found odd."""
    slug = run_folder.slug(name or "my-dataset")
    folder = root() / slug
    folder.mkdir(parents=True, exist_ok=True)
    findings = importing.import_files(sources, folder, names=original_names)
    os.utime(folder)  # the one worked on is the first in the list
    return slug, findings


def add_example(which: object) -> str:
    """A copy of one of the example datasets; the existing copy where there is one."""
    if which not in EXAMPLE_TITLES or not (EXAMPLES / str(which)).is_dir():
        raise DatasetError("There is no such example.")
    slug = f"example-{which}"
    if (root() / slug).is_dir() and any(path.suffix.lower() in pictures.PICTURE_SUFFIXES for path in (root() / slug).iterdir()):
        os.utime(root() / slug)
        return slug
    kept = (".txt", *pictures.PICTURE_SUFFIXES)
    return add(slug, sorted(path for path in (EXAMPLES / str(which)).iterdir() if path.suffix in kept and path.stem != "LICENSE"), {})[0]


def examples() -> list[dict[str, str]]:
    return [{"id": which, "title": title} for which, title in EXAMPLE_TITLES.items() if (EXAMPLES / which).is_dir()]


def removed_folder(name: str) -> Path:
    return run_folder.outputs_folder() / "cache" / "removed" / name


def remove_picture(name: object, file: object) -> None:
    """Takes a picture and its caption out; `restore_picture` brings them back."""
    picture = resolve_picture(name, file)
    for path in (picture, captions.caption_path(picture)):
        if path.is_file():
            target = removed_folder(str(name)) / path.relative_to(resolve(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)


def restore_picture(name: object, file: object) -> None:
    folder, kept = resolve(name), removed_folder(str(name))
    picture = kept / str(file)
    if (
        not os.path.isfile(picture)
        or not picture.resolve().is_relative_to(kept.resolve())
        or picture.suffix.lower() not in pictures.PICTURE_SUFFIXES
    ):
        raise DatasetError("The picture cannot be brought back; add it again.")
    for path in (picture, captions.caption_path(picture)):
        if path.is_file():
            shutil.move(path, folder / path.relative_to(kept))


def remove(name: object) -> None:
    shutil.rmtree(resolve(name))


def scan(name: str, resolution: int = 64, trigger: str = "", caption_tokens: int = 75) -> tuple[list[reading.DatasetItem], list[Finding]]:
    """Pictures and findings of a dataset; read again only when a file in it changed. Raises DatasetError where no picture is usable."""
    folder = resolve(name)
    signature = tuple(sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()))
    return _scan(folder, hash(signature), resolution, trigger, caption_tokens)


@lru_cache(maxsize=32)
def _scan(
    folder: Path, signature: int, resolution: int, trigger: str, caption_tokens: int
) -> tuple[list[reading.DatasetItem], list[Finding]]:
    return reading.scan_dataset(folder, resolution=resolution, trigger=trigger, caption_tokens=caption_tokens)


def view(name: str | None) -> dict:
    """All that the Dataset tab draws."""
    if not name:
        return {"name": "", "cards": [], "findings": [], "examples": examples()}
    folder = resolve(name)
    try:
        items, findings = scan(name)
    except DatasetError as error:
        empty = not any(path.is_file() for path in folder.rglob("*"))
        return {"name": name, "examples": examples(), "cards": [], "findings": [] if empty else [_finding("", "error", str(error))]}
    return {
        "name": name,
        "examples": examples(),
        "cards": [_card(name, folder, item) for item in items],
        "findings": _findings(findings),
        "verdict": doctor.verdict(len(items), findings),
    }


def summary(name: object) -> dict:
    """The part of the view that changes with a caption."""
    resolve(name)
    items, findings = scan(str(name))
    return {"findings": _findings(findings), "verdict": doctor.verdict(len(items), findings)}


def _card(name: str, folder: Path, item: reading.DatasetItem) -> dict:
    file = item.path.relative_to(folder).as_posix()
    version = item.path.stat().st_mtime_ns
    return {
        "file": file,
        "caption": item.caption,
        "size": f"{item.width} × {item.height}",
        "src": f"/thumb/{name}/{_key(file)}?v={version}",
    }


def crop_shown(item: reading.DatasetItem, settings: config.Dataset) -> dict:
    """The overlay of a picture: the part that is trained on, from 0 to 1, and its size in pixels."""
    crop = reading.crop_of(item, settings)
    return {"box": [round(side, 5) for side in buckets.box_of(crop)], "bucket": list(crop.bucket), "moved": item.crop_centre is not None}


def _findings(findings: list[Finding]) -> list[dict]:
    return [_finding(finding.file, finding.level, finding.message) for finding in findings]


def _finding(file: str, level: str, text: str) -> dict:
    return {"file": file, "level": level, "text": text}


def thumbnail(name: object, key: str) -> Path:
    """A small copy of the picture with that key, made on demand. Raises DatasetError where there is none."""
    folder = resolve(name)
    changed = folder.stat().st_mtime_ns
    file = _files_by_key(folder, changed).get(key)
    if file is None:  # a folder inside may have changed
        _files_by_key.cache_clear()
        file = _files_by_key(folder, changed).get(key)
    picture = resolve_picture(name, file)
    version = hashlib.sha256(f"{picture}{picture.stat().st_mtime_ns}".encode()).hexdigest()[:32]
    target = run_folder.outputs_folder() / "cache" / "thumbs" / f"{version}.webp"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        pictures.save_thumbnail(picture, target)
    return target


def _key(file: str) -> str:
    """How a picture is named in an address, whatever its file is called."""
    return hashlib.sha256(file.encode("utf-8", "surrogateescape")).hexdigest()[:24]


@lru_cache(maxsize=8)
def _files_by_key(folder: Path, changed: int) -> dict[str, str]:
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() in pictures.PICTURE_SUFFIXES]
    return {_key(file): file for file in files}


def suggest_trigger(items: list[reading.DatasetItem]) -> str:
    """The first word that all captions share and that is no ordinary one: what the person already uses as a trigger."""
    words = [re.findall(r"[^\s,.;:!?()]+", item.caption.lower()) for item in items]
    if len(words) < FEWEST_FOR_TRIGGER:
        return ""
    shared = set.intersection(*map(set, words)) - ORDINARY_WORDS
    return next((word for word in words[0] if word in shared), "")

"""The datasets of the page: folders below `outputs/datasets`, addressed by name, never by path.

Every name that comes from the browser goes through `resolve` or `resolve_image`; what does not exist and
what is not allowed get the same answer.
"""

import hashlib
import io
import os
import re
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from app.jobs import runs
from trainer import config
from trainer.curation import ingest
from trainer.data import buckets, captions, crops, images
from trainer.data import scan as reading
from trainer.data.issues import OWN_FOLDER, Issue
from trainer.errors import DatasetError, TrainerError
from trainer.models.model_files import EMBEDDED_FOLDER
from trainer.runs import run_folder
from trainer.runs.atomic_files import atomic_write

EXAMPLES = EMBEDDED_FOLDER.parent / "examples"
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
THUMBNAIL, LARGE = 320, 1280  # pixels of the longer side


def root() -> Path:
    return run_folder.outputs_folder() / "datasets"


def names() -> list[str]:
    """All datasets, the one changed last first."""
    if not root().is_dir():
        return []
    folders = [
        folder
        for folder in root().iterdir()
        if folder.is_dir() and folder.name == run_folder.slug(folder.name)
    ]
    return [
        folder.name
        for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True)
    ]


def resolve(name: object) -> Path:
    """The folder of a dataset. Raises DatasetError for what is none."""
    folder = root() / str(name)
    if (
        not isinstance(name, str)
        or run_folder.slug(name) != name
        or not folder.is_dir()
        or folder.is_symlink()
    ):
        raise DatasetError("There is no such dataset; choose one from the list.")
    return folder


def resolve_image(name: object, file: object) -> Path:
    """A picture of a dataset by its path below the dataset's folder."""
    folder = resolve(name)
    path = folder / str(file)
    if isinstance(file, str) and not os.path.isfile(
        path
    ):  # a name that is no UTF-8 comes from the browser as it was shown there
        path = next(
            (
                other
                for other in reading.files_of(folder)
                if captions.relative(other, folder) == file
            ),
            path,
        )
    is_picture = isinstance(file, str) and path.suffix.lower() in images.IMAGE_SUFFIXES
    if (
        not is_picture
        or not os.path.isfile(path)
        or not path.resolve().is_relative_to(folder.resolve())
    ):
        raise DatasetError("There is no such picture in this dataset.")
    return path


def add(name: str, sources: Sequence[Path | tuple[Path, str]]) -> tuple[str, list[Issue]]:
    """Copies dropped files, alone or with the names they had, into a dataset, made if new. Returns its name and what was found odd."""
    slug = run_folder.slug(name or "my-dataset")
    folder = root() / slug
    folder.mkdir(parents=True, exist_ok=True)
    findings = ingest.import_files(sources, folder)
    os.utime(folder)  # the one worked on is the first in the list
    return slug, findings


def add_example(which: object) -> str:
    """A copy of one of the example datasets; the existing copy where there is one."""
    if which not in EXAMPLE_TITLES or not (EXAMPLES / str(which)).is_dir():
        raise DatasetError("There is no such example.")
    slug = f"example-{which}"
    if (root() / slug).is_dir() and any(
        path.suffix.lower() in images.IMAGE_SUFFIXES for path in (root() / slug).iterdir()
    ):
        os.utime(root() / slug)
        return slug
    kept = (".txt", *images.IMAGE_SUFFIXES)
    return add(
        slug,
        sorted(
            path
            for path in (EXAMPLES / str(which)).iterdir()
            if path.suffix in kept and path.stem != "LICENSE"
        ),
    )[0]


def examples() -> list[dict[str, str]]:
    return [
        {"id": which, "title": title}
        for which, title in EXAMPLE_TITLES.items()
        if (EXAMPLES / which).is_dir()
    ]


def trash() -> Path:
    """Where removed datasets lie until the person empties it."""
    return run_folder.outputs_folder() / "trash"


def remove(name: object) -> str:
    """Moves a dataset to the trash. Returns the name under which `restore` brings it back."""
    folder = resolve(name)
    _refuse_in_use(folder)
    trash().mkdir(parents=True, exist_ok=True)
    kept = f"{folder.name}-{time.time_ns()}"
    os.replace(folder, trash() / kept)
    return kept


def restore(kept: object) -> str:
    """Brings a removed dataset back, under its own name or, where that is taken, another. Returns the name."""
    name, _, stamp = str(kept).rpartition("-")
    if run_folder.slug(name) != name or not stamp.isdigit() or not (trash() / str(kept)).is_dir():
        raise DatasetError("This dataset is not in the trash any more.")
    target = _free(name)
    root().mkdir(parents=True, exist_ok=True)
    os.replace(trash() / str(kept), target)
    return target.name


def rename(name: object, new: object) -> str:
    """Gives a dataset another name. Returns it."""
    folder, slug = resolve(name), run_folder.slug(str(new or ""))
    if not any(map(str.isalnum, str(new or ""))):
        raise DatasetError("Give the dataset a name of letters or digits.")
    if slug == folder.name:
        return slug
    _refuse_in_use(folder)
    if (root() / slug).exists():
        raise DatasetError(f"There is a dataset named {slug} already; choose another name.")
    os.replace(folder, root() / slug)
    runs.follow_dataset(folder, root() / slug)
    return slug


def duplicate(name: object) -> str:
    """A copy with captions, masks and crops, without the journal. Returns its name."""
    folder = resolve(name)
    target = _free(f"{folder.name}-copy")
    work = Path(tempfile.mkdtemp(prefix=".copying-", dir=root()))
    try:
        shutil.copytree(
            folder,
            work / "set",
            symlinks=True,
            ignore=shutil.ignore_patterns("journal", "captioning", "lock"),
        )
        os.replace(work / "set", target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target.name


def _free(name: str) -> Path:
    """A folder that is not there yet."""
    slug = run_folder.slug(name)
    return next(
        path
        for path in (root() / (slug if n == 1 else f"{slug}-{n}") for n in range(1, 10_000))
        if not path.exists()
    )


def _refuse_in_use(folder: Path) -> None:
    """A run that trains or waits reads its pictures by their place."""
    for run in [*runs.waiting(), *filter(None, [runs.active()])]:
        try:
            used = Path(runs.settings(run).dataset.folder)
        except TrainerError:
            continue
        if used == folder:
            raise DatasetError(
                f"The run {run.name} trains on this dataset or waits to: let it end, or stop it first."
            )


def export(name: object) -> Iterator[bytes]:
    """The dataset as a zip, piece by piece: what a person put there, not what this program keeps."""
    folder = resolve(name)
    files = [path for path in reading.files_of(folder) if path.is_file() and not path.is_symlink()]
    return _zipped(folder, files)


def _zipped(folder: Path, files: list[Path]) -> Iterator[bytes]:
    pieces = _Pieces()
    with zipfile.ZipFile(
        pieces, "w", zipfile.ZIP_STORED
    ) as archive:  # pictures do not become smaller
        for path in files:
            name = f"{folder.name}/{captions.relative(path, folder)}"
            info = zipfile.ZipInfo.from_file(path, name, strict_timestamps=False)
            with (
                open(path, "rb") as source,
                archive.open(info, "w", force_zip64=path.stat().st_size > 2**30) as target,
            ):
                while piece := source.read(2**20):
                    target.write(piece)
                    yield pieces.take()
            yield pieces.take()
    yield pieces.take()


class _Pieces(io.RawIOBase):
    """A file that is written to and emptied in turn."""

    def __init__(self) -> None:
        self.held = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.held += data
        return len(data)

    def take(self) -> bytes:
        taken = bytes(self.held)
        self.held.clear()
        return taken


def scan(
    name: str, resolution: int = 64, trigger: str = "", caption_tokens: int = 75
) -> tuple[list[reading.DatasetItem], list[Issue]]:
    """Pictures and findings of a dataset; read again only when a file in it changed. Raises DatasetError where no picture is usable."""
    folder = resolve(name)
    return _scan(folder, signature(folder), resolution, trigger, caption_tokens)


def signature(folder: Path) -> int:
    """Another number when a file of the dataset, or a crop, was changed."""
    found = []
    waiting = [folder]
    while waiting:
        for entry in os.scandir(waiting.pop()):
            if entry.is_dir(follow_symlinks=False):
                waiting += [Path(entry.path)] if not entry.name.startswith(".") else []
            else:
                status = entry.stat(follow_symlinks=False)
                found.append((entry.path, status.st_size, status.st_mtime_ns))
    kept = folder / OWN_FOLDER / crops.FILE
    return hash((tuple(sorted(found)), kept.read_bytes() if kept.is_file() else b""))


@lru_cache(maxsize=32)
def _scan(
    folder: Path, signature: int, resolution: int, trigger: str, caption_tokens: int
) -> tuple[list[reading.DatasetItem], list[Issue]]:
    return reading.scan_dataset(
        folder, resolution=resolution, trigger=trigger, caption_tokens=caption_tokens
    )


def crop_shown(item: reading.DatasetItem, settings: config.Dataset) -> dict:
    """The overlay of a picture: the part that is trained on, from 0 to 1, and its size in pixels."""
    crop = reading.crop_of(item, settings)
    return {
        "box": [round(side, 5) for side in buckets.box_of(crop)],
        "bucket": list(crop.bucket),
        "moved": item.crop_centre is not None,
    }


def thumbnail(name: object, key: str, side: int = THUMBNAIL) -> Path:
    """A small copy of the picture with that key, made on demand. Raises DatasetError where there is none."""
    folder = resolve(name)
    changed = folder.stat().st_mtime_ns
    file = _files_by_key(folder, changed).get(key)
    if file is None:  # a folder inside may have changed
        _files_by_key.cache_clear()
        file = _files_by_key(folder, changed).get(key)
    picture = resolve_image(name, file)
    version = hashlib.sha256(
        f"{picture}{picture.stat().st_mtime_ns}{side}".encode("utf-8", "surrogateescape")
    ).hexdigest()[:32]
    target = run_folder.outputs_folder() / "cache" / "thumbs" / f"{version}.webp"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        images.save_thumbnail(picture, target, side)
    return target


def mask_shown(name: object, key: str) -> Path:
    """The mask of the picture with that key as a grey PNG of at most `LARGE` pixels. Raises DatasetError where there is none."""
    folder = resolve(name)
    file = next(
        (
            file
            for file in _files_by_key(folder, folder.stat().st_mtime_ns).values()
            if key_of(file) == key
        ),
        None,
    )
    picture = resolve_image(name, file)
    _, masks = reading.pair_masks(
        [
            picture,
            *picture.parent.glob("*.png"),
            *(picture.parent / reading.MASK_FOLDER).glob("*.png"),
        ]
    )
    if picture not in masks:
        raise DatasetError("The picture has no mask.")
    mask = resolve_image(name, masks[picture].relative_to(folder).as_posix())
    version = hashlib.sha256(
        f"{mask}{mask.stat().st_mtime_ns}".encode("utf-8", "surrogateescape")
    ).hexdigest()[:32]
    target = run_folder.outputs_folder() / "cache" / "thumbs" / f"{version}.png"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        image = images.open_image(mask)[0].convert("L")
        image.thumbnail((LARGE, LARGE))
        encoded = io.BytesIO()
        image.save(encoded, "PNG")
        atomic_write(target, encoded.getvalue())
    return target


def key_of(file: str) -> str:
    """How a picture is named in an address, whatever its file is called."""
    return hashlib.sha256(file.encode("utf-8", "surrogateescape")).hexdigest()[:24]


@lru_cache(maxsize=8)
def _files_by_key(folder: Path, changed: int) -> dict[str, str]:
    files = [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in images.IMAGE_SUFFIXES
    ]
    return {key_of(file): file for file in files}


def suggest_trigger(items: list[reading.DatasetItem]) -> str:
    """The first word that all captions share and that is no ordinary one: what the person already uses as a trigger."""
    words = [re.findall(r"[^\s,.;:!?()]+", item.caption.lower()) for item in items]
    if len(words) < FEWEST_FOR_TRIGGER:
        return ""
    shared = set.intersection(*map(set, words)) - ORDINARY_WORDS
    return next((word for word in words[0] if word in shared), "")

"""Renames, copies, removes, restores and exports whole datasets."""

import io
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.actions import datasets
from app.jobs import queue, run_actions, runs
from trainer.data import dataset_files
from trainer.errors import DatasetError, TrainerError
from trainer.runs import run_folder

NOT_COPIED = ("journal", "captioning", "lock")
"""The history and the jobs of a dataset belong to the original."""
MAX_SAME_NAMES = 10_000
PIECE_BYTES = 2**20
ZIP64_FROM_BYTES = 2**30


def trash() -> Path:
    """Returns the folder of removed datasets, which a person empties."""
    return run_folder.outputs_folder() / "trash"


def remove(name: object) -> str:
    """Moves a dataset to the trash. Returns the name to give to `restore`.

    Raises DatasetError if a run uses the dataset.
    """
    folder = datasets.resolve(name)
    _refuse_in_use(folder)
    trash().mkdir(parents=True, exist_ok=True)
    removed_name = f"{folder.name}-{time.time_ns()}"
    os.replace(folder, trash() / removed_name)
    return removed_name


def restore(removed_name: object) -> str:
    """Moves a dataset back from the trash. Returns its name, a new one if the old one is used."""
    name, _, stamp = str(removed_name).rpartition("-")
    is_known = run_folder.slug(name) == name and stamp.isdigit()
    if not is_known or not (trash() / str(removed_name)).is_dir():
        raise DatasetError("This dataset is not in the trash any more.")
    target = _unused_folder(name)
    datasets.root().mkdir(parents=True, exist_ok=True)
    os.replace(trash() / str(removed_name), target)
    return target.name


def rename(name: object, new_name: object) -> str:
    """Renames a dataset, also in the settings of all runs. Returns the new name.

    Raises DatasetError if the name is taken or has no letter, or if a run uses the dataset.
    """
    folder = datasets.resolve(name)
    text = str(new_name or "")
    slug = run_folder.slug(text)
    if not any(map(str.isalnum, text)):
        raise DatasetError("Give the dataset a name of letters or digits.")
    if slug == folder.name:
        return slug
    _refuse_in_use(folder)
    target = datasets.root() / slug
    if target.exists():
        raise DatasetError(f"There is a dataset named {slug} already; choose another name.")
    os.replace(folder, target)
    run_actions.follow_dataset(folder, target)
    return slug


def duplicate(name: object) -> str:
    """Copies a dataset with captions, masks and crops, without its history. Returns the name."""
    folder = datasets.resolve(name)
    target = _unused_folder(f"{folder.name}-copy")
    # The copy appears in the list only when it is complete.
    work = Path(tempfile.mkdtemp(prefix=".copying-", dir=datasets.root()))
    try:
        ignore = shutil.ignore_patterns(*NOT_COPIED)
        shutil.copytree(folder, work / "set", symlinks=True, ignore=ignore)
        os.replace(work / "set", target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target.name


def _unused_folder(name: str) -> Path:
    slug = run_folder.slug(name)
    for number in range(1, MAX_SAME_NAMES):
        folder = datasets.root() / (slug if number == 1 else f"{slug}-{number}")
        if not folder.exists():
            return folder
    raise DatasetError(f"There are too many datasets named {slug}; choose another name.")


def _refuse_in_use(folder: Path) -> None:
    """Raises DatasetError if a run that is active or waits reads images from the folder."""
    active = runs.active()
    for run in [*queue.waiting_runs(), *([active] if active else [])]:
        try:
            used = Path(runs.settings(run).dataset.folder)
        except TrainerError:
            continue
        if used == folder:
            raise DatasetError(
                f"The run {run.name} trains on this dataset or waits to: "
                "let it end, or stop it first."
            )


def export(name: object) -> Iterator[bytes]:
    """Returns the dataset as a zip, piece by piece, without the files of this program."""
    folder = datasets.resolve(name)
    files = []
    for path in dataset_files.files_of(folder):
        if path.is_file() and not path.is_symlink():
            files.append(path)
    return _zipped(folder, files)


def _zipped(folder: Path, files: list[Path]) -> Iterator[bytes]:
    buffer = _Buffer()
    # Images do not become smaller by compression.
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for path in files:
            name = f"{folder.name}/{dataset_files.relative(path, folder)}"
            info = zipfile.ZipInfo.from_file(path, name, strict_timestamps=False)
            is_large = path.stat().st_size > ZIP64_FROM_BYTES
            with open(path, "rb") as source, archive.open(info, "w", force_zip64=is_large) as entry:
                while piece := source.read(PIECE_BYTES):
                    entry.write(piece)
                    yield buffer.take()
            yield buffer.take()
    yield buffer.take()


class _Buffer(io.RawIOBase):
    """A file whose content is taken out while it is being written."""

    def __init__(self) -> None:
        self._content = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._content += data
        return len(data)

    def take(self) -> bytes:
        """Returns what was written since the last call."""
        content = bytes(self._content)
        self._content.clear()
        return content

"""The history of a dataset: every change goes through here and can be undone to the byte.

    .atelier/journal/000007/entry.json   the label of the change and the files that it concerns
    .atelier/journal/000007/3            the previous content of the file of the fourth edit

The entry is on disk before the first file is touched, so that an interrupted change can be undone
too. Nothing is ever deleted: what a change removes or replaces is moved to its entry, and what an
undo replaces stays there.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

from filelock import FileLock

from trainer.data.dataset_files import OWN_FOLDER
from trainer.data.issue import printable
from trainer.errors import DatasetError
from trainer.runs.atomic_files import atomic_write

FOLDER = f"{OWN_FOLDER}/journal"
UNDONE = "undone"  # part of the folder name of an entry that was undone
LOCK_SECONDS = 60


@dataclass(frozen=True)
class Edit:
    """Replaces the whole content of a file of a dataset, or removes it if `content` is None."""

    path: Path
    content: bytes | None


@dataclass(frozen=True)
class Entry:
    """A change that can be undone."""

    number: int
    label: str
    """Describes the change to the user: "Removed 3 images"."""
    time: float
    files: int


class StoredEdit(TypedDict):
    """One edit in `entry.json`. Hashes are SHA-256; None means that the file does not exist."""

    file: str
    """Path relative to the dataset."""
    before: str | None
    after: str | None
    earlier: NotRequired[str | None]
    """The hash before the last of several edits that were merged into this one."""


class StoredEntry(TypedDict):
    """The content of `entry.json`."""

    label: str
    time: float
    merge: str
    edits: list[StoredEdit]


# Changing and undoing


def apply(dataset: Path, label: str, edits: Sequence[Edit], merge: str = "") -> int:
    """Applies edits as one change and returns the number of files that changed.

    Edits without an effect are skipped. If the process is interrupted, `undo` restores the files
    that were already changed. A change with the same `merge` word as the last one becomes part of
    it, unless somebody else has touched its files since: typing a caption is one change, and so
    is a job that writes many captions.

    Raises `DatasetError` for a path outside the dataset, a link or a folder, and `OSError` if a
    file cannot be written.
    """
    dataset = Path(dataset)
    with _locked(dataset):
        stored = [_stored_edit(dataset, edit) for edit in edits]
        changes = [change for change in stored if change["before"] != change["after"]]
        if not changes:
            return 0
        contents = {_relative_name(dataset, edit.path): edit.content for edit in edits}

        # Write the entry and copies of the files that will be replaced.
        mergeable = _mergeable_entry(dataset, changes, merge)
        if mergeable:
            folder, entry = mergeable
        else:
            folder = _new_entry_folder(dataset)
            entry = {"label": label, "time": time.time(), "merge": merge, "edits": []}
        saved = {edit["file"] for edit in entry["edits"]}
        numbers = _add_edits(entry, changes)
        for change in changes:
            file = change["file"]
            if file not in saved and _is_replaced(change):
                atomic_write(folder / str(numbers[file]), (dataset / file).read_bytes())
        _write_entry(folder, entry)

        # Change the files.
        for change in changes:
            path, content = dataset / change["file"], contents[change["file"]]
            if content is not None:
                _write(path, content)
            else:
                os.replace(path, folder / str(numbers[change["file"]]))
        return len(changes)


def last(dataset: Path) -> Entry | None:
    """Returns the change that `undo` would undo, or None."""
    folder = _last_entry_folder(Path(dataset))
    if folder is None:
        return None
    entry = _read_entry(folder)
    return Entry(int(folder.name), entry["label"], entry["time"], len(entry["edits"]))


def undo(dataset: Path) -> tuple[str, list[str]]:
    """Undoes the last change.

    Returns its label and the printable names of files that were left alone, because somebody has
    changed them since. Raises `DatasetError` if there is nothing to undo.
    """
    dataset = Path(dataset)
    with _locked(dataset):
        folder = _last_entry_folder(dataset)
        if folder is None:
            raise DatasetError("There is nothing to undo in this dataset.")
        entry = _read_entry(folder)
        skipped = []
        for number, edit in reversed(list(enumerate(entry["edits"]))):
            if not _undo_edit(dataset, folder, number, edit):
                skipped.append(printable(edit["file"]))
        os.replace(folder, folder.with_name(f"{folder.name}-{UNDONE}-{time.time_ns()}"))
        return entry["label"], skipped


def _undo_edit(dataset: Path, folder: Path, number: int, edit: StoredEdit) -> bool:
    """Restores one file. Returns False if somebody has changed it since."""
    path = dataset / edit["file"]
    now = _hash(path)
    if now == edit["before"]:
        return True  # never changed, or already restored by an undo that was interrupted
    # `earlier`: the last of several merged edits may not have been written, as on a full disk.
    if now not in (edit["after"], edit.get("earlier", edit["after"])):
        return False
    backup = folder / str(number)
    if now is not None:
        os.replace(path, folder / f"{number}.after")
    if edit["before"] is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if edit["after"] is None:
            os.replace(backup, path)
        else:
            atomic_write(path, backup.read_bytes())
    return True


def own_folder(dataset: Path) -> Path:
    """Returns the `.atelier` folder of a dataset, and creates it if it is missing."""
    folder = dataset / OWN_FOLDER
    if folder.is_symlink():
        raise DatasetError(
            f"{OWN_FOLDER} in {printable(dataset.name)} is a link, which is not followed: "
            "delete it."
        )
    folder.mkdir(exist_ok=True)
    return folder


def _locked(dataset: Path) -> FileLock:
    return FileLock(own_folder(dataset) / "lock", timeout=LOCK_SECONDS)


# Files


def _relative_name(dataset: Path, path: Path) -> str:
    """Returns the path relative to the dataset. Raises `DatasetError` if it leads outside."""
    name = path.relative_to(dataset).as_posix()
    if ".." in Path(name).parts or not path.parent.resolve().is_relative_to(dataset.resolve()):
        raise DatasetError(f"{printable(name)} is not in the dataset.")
    return name


def _stored_edit(dataset: Path, edit: Edit) -> StoredEdit:
    file, name = _relative_name(dataset, edit.path), printable(edit.path.name)
    if edit.path.is_symlink():
        raise DatasetError(f"{name} is a link, which is not followed: delete it, then try again.")
    if edit.path.is_dir():
        raise DatasetError(f"{name} is a folder, but should be a file: rename it, then try again.")
    after = None if edit.content is None else hashlib.sha256(edit.content).hexdigest()
    return {"file": file, "before": _hash(edit.path), "after": after}


def _is_replaced(edit: StoredEdit) -> bool:
    """Returns whether the file exists before and after the edit. A removed file is moved."""
    return edit["before"] is not None and edit["after"] is not None


def _hash(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, content)


# Entries


def _add_edits(entry: StoredEntry, changes: Sequence[StoredEdit]) -> dict[str, int]:
    """Adds edits to an entry. Returns the number of each file's edit in the entry."""
    numbers = {edit["file"]: number for number, edit in enumerate(entry["edits"])}
    for change in changes:
        if change["file"] in numbers:
            merged = entry["edits"][numbers[change["file"]]]
            merged["after"], merged["earlier"] = change["after"], change["before"]
        else:
            numbers[change["file"]] = len(entry["edits"])
            entry["edits"].append(change)
    return numbers


def _new_entry_folder(dataset: Path) -> Path:
    history = own_folder(dataset) / Path(FOLDER).name
    history.mkdir(exist_ok=True)
    numbers = [int(path.name[:6]) for path in history.iterdir() if path.name[:6].isdigit()]
    folder = history / f"{max(numbers, default=0) + 1:06}"
    folder.mkdir()
    return folder


def _write_entry(folder: Path, entry: StoredEntry) -> None:
    atomic_write(folder / "entry.json", json.dumps(entry))


def _read_entry(folder: Path) -> StoredEntry:
    try:
        data = json.loads((folder / "entry.json").read_bytes())
        return {
            "label": str(data["label"]),
            "time": float(data["time"]),
            "merge": data.get("merge", ""),
            "edits": list(data["edits"]),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"The history of this dataset is damaged ({printable(str(folder))}), but all of its "
            "files are still there."
        ) from error


def _last_entry_folder(dataset: Path) -> Path | None:
    """Returns the folder of the last entry that was not undone.

    An entry without `entry.json` was interrupted before it changed a file.
    """
    history = dataset / FOLDER
    if not history.is_dir():
        return None
    folders = [
        path
        for path in history.iterdir()
        if path.name.isdigit() and (path / "entry.json").is_file()
    ]
    return max(folders, key=lambda path: path.name, default=None)


def _mergeable_entry(
    dataset: Path, changes: Sequence[StoredEdit], merge: str
) -> tuple[Path, StoredEntry] | None:
    """Returns the last entry and its folder if the changes can become part of it."""
    folder = _last_entry_folder(dataset) if merge else None
    if folder is None:
        return None
    entry = _read_entry(folder)
    if entry["merge"] != merge:
        return None
    known = {edit["file"]: edit["after"] for edit in entry["edits"]}
    for change in changes:
        is_untouched = known.get(change["file"], change["before"]) == change["before"]
        if change["after"] is None or not is_untouched:
            return None
    return folder, entry

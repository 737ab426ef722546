"""Every change to a dataset goes through here, and can be taken back to the byte.

    .atelier/journal/000007/entry.json   what was done, and to which files
    .atelier/journal/000007/3            what the file of the fourth edit was before

The entry is on the disk before the first file is touched, so a change that is cut off can be taken back too. Nothing is
ever deleted: what a change removes or replaces lies in its entry, and what an undo replaces stays in there.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from trainer.data.dataset_files import OWN_FOLDER
from trainer.data.issues import shown
from trainer.errors import DatasetError
from trainer.runs.atomic_files import atomic_write

FOLDER = f"{OWN_FOLDER}/journal"
UNDONE = "undone"  # the end of the name of an entry that was taken back


@dataclass(frozen=True)
class Edit:
    """A file of a dataset gets this content, whole; with None it is taken away."""

    path: Path
    content: bytes | None


@dataclass(frozen=True)
class Entry:
    """A change that can be taken back."""

    number: int
    label: str
    """What was done, for the person: "Removed 3 pictures"."""
    time: float
    files: int


def apply(dataset: Path, label: str, edits: Sequence[Edit], merge: str = "") -> int:
    """Make a change: all of it, or what an undo takes back. Returns the number of files that became others.

    Edits that change nothing are left out. A change with the same `merge` word as the last one becomes part of it, unless
    somebody touched its files since: typing a caption is one change, not fifty, and so is a job that writes many.
    Raises `DatasetError` for a path outside the dataset, a link or a folder; `OSError` where nothing can be written.
    """
    dataset = Path(dataset)
    with _locked(dataset):
        rows = [
            row for row in (_row(dataset, edit) for edit in edits) if row["before"] != row["after"]
        ]
        contents = {_name(dataset, edit.path): edit.content for edit in edits}
        if not rows:
            return 0
        new: dict[str, Any] = {"label": label, "time": time.time(), "merge": merge, "edits": []}
        entry, data = _mergeable(dataset, rows, merge) or (_new_entry(dataset), new)
        numbers = {row["file"]: number for number, row in enumerate(data["edits"])}
        for row in rows:
            if row["file"] in numbers:
                data["edits"][numbers[row["file"]]] |= {
                    "after": row["after"],
                    "earlier": row["before"],
                }
                continue
            numbers[row["file"]] = len(data["edits"])
            data["edits"].append(row)
            if row["before"] is not None and not _is_moved(row):
                atomic_write(
                    entry / str(numbers[row["file"]]), (dataset / row["file"]).read_bytes()
                )
        _write_entry(entry, data)
        for row in rows:
            path = dataset / row["file"]
            if _is_moved(row):
                os.replace(path, entry / str(numbers[row["file"]]))
            elif (content := contents[row["file"]]) is not None:
                _place(path, content)
        return len(rows)


def last(dataset: Path) -> Entry | None:
    """The change that an undo would take back."""
    folder = _last_folder(Path(dataset))
    if folder is None:
        return None
    data = _read_entry(folder)
    return Entry(int(folder.name), data["label"], data["time"], len(data["edits"]))


def undo(dataset: Path) -> tuple[str, list[str]]:
    """Take back the last change. Returns its label, and the shown names of files left alone since others changed them.

    Raises `DatasetError` where there is nothing to take back.
    """
    dataset = Path(dataset)
    with _locked(dataset):
        folder = _last_folder(dataset)
        if folder is None:
            raise DatasetError("There is nothing to take back in this dataset.")
        data, kept = _read_entry(folder), []
        for number, row in reversed(list(enumerate(data["edits"]))):
            path, now = dataset / row["file"], _hash(dataset / row["file"])
            if now == row["before"]:
                continue  # never done, or taken back before a cut
            if now not in (
                row["after"],
                row.get("earlier", row["after"]),
            ):  # the disk may have been full for the last of several
                kept.append(shown(row["file"]))
                continue
            if now is not None:
                os.replace(path, folder / f"{number}.after")
            if row["before"] is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                if row["after"] is None:
                    os.replace(folder / str(number), path)
                else:
                    atomic_write(path, (folder / str(number)).read_bytes())
        os.replace(folder, folder.with_name(f"{folder.name}-{UNDONE}-{time.time_ns()}"))
        return data["label"], kept


def own_folder(dataset: Path) -> Path:
    """`.atelier` of a dataset, made where it is missing."""
    folder = dataset / OWN_FOLDER
    if folder.is_symlink():
        raise DatasetError(
            f"{OWN_FOLDER} in {shown(dataset.name)} is a link, which is not followed: delete it."
        )
    folder.mkdir(exist_ok=True)
    return folder


def _locked(dataset: Path) -> FileLock:
    return FileLock(own_folder(dataset) / "lock", timeout=60)


def _name(dataset: Path, path: Path) -> str:
    name = path.relative_to(dataset).as_posix()
    if ".." in Path(name).parts or not path.parent.resolve().is_relative_to(dataset.resolve()):
        raise DatasetError(f"{shown(name)} does not lie in the dataset.")
    return name


def _row(dataset: Path, edit: Edit) -> dict[str, Any]:
    name = _name(dataset, edit.path)
    if edit.path.is_symlink():
        raise DatasetError(
            f"{shown(edit.path.name)} is a link, which is not followed: delete it, then try again."
        )
    if edit.path.is_dir():
        raise DatasetError(
            f"{shown(edit.path.name)} is a folder where a file should be: rename it, then try again."
        )
    after = None if edit.content is None else hashlib.sha256(edit.content).hexdigest()
    return {"file": name, "before": _hash(edit.path), "after": after}


def _is_moved(row: dict[str, Any]) -> bool:
    return row["before"] is not None and row["after"] is None


def _hash(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _place(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, content)


def _new_entry(dataset: Path) -> Path:
    folder = own_folder(dataset) / "journal"
    folder.mkdir(exist_ok=True)
    numbers = [int(path.name[:6]) for path in folder.iterdir() if path.name[:6].isdigit()]
    entry = folder / f"{max(numbers, default=0) + 1:06}"
    entry.mkdir()
    return entry


def _write_entry(entry: Path, data: dict[str, Any]) -> None:
    atomic_write(entry / "entry.json", json.dumps(data))


def _read_entry(entry: Path) -> dict[str, Any]:
    try:
        data = json.loads((entry / "entry.json").read_bytes())
        return {
            "label": str(data["label"]),
            "time": float(data["time"]),
            "merge": data.get("merge", ""),
            "edits": list(data["edits"]),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"The journal of this dataset is damaged ({shown(str(entry))}): its files are all still there."
        ) from error


def _last_folder(dataset: Path) -> Path | None:
    """Entries without their record were cut off before the first file was touched."""
    folder = dataset / FOLDER
    if not folder.is_dir():
        return None
    entries = [
        path for path in folder.iterdir() if path.name.isdigit() and (path / "entry.json").is_file()
    ]
    return max(entries, key=lambda path: path.name, default=None)


def _mergeable(
    dataset: Path, rows: list[dict[str, Any]], merge: str
) -> tuple[Path, dict[str, Any]] | None:
    """The last entry, where the rows can become part of it."""
    folder = _last_folder(dataset) if merge else None
    if folder is None:
        return None
    data = _read_entry(folder)
    earlier = {row["file"]: row["after"] for row in data["edits"]}
    fits = data["merge"] == merge and all(
        row["after"] is not None and earlier.get(row["file"], row["before"]) == row["before"]
        for row in rows
    )
    return (folder, data) if fits else None

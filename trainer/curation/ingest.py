"""Imports files, folders and zips into a dataset: copied, never changed, never overwriting.

Nothing is written outside the dataset, every name is made safe, and only readable images and
captions are imported. The steps are in separate modules: `import_zip` unpacks, `import_names`
makes names safe, and `import_copy` decides on names and copies.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from trainer.curation.import_copy import DatasetImport
from trainer.curation.import_names import MAX_DEPTH, TOO_DEEP, SourceFile
from trainer.curation.import_zip import unpack
from trainer.data.dataset_files import is_junk, suffix_of
from trainer.data.issue import Issue, Level, printable
from trainer.errors import DatasetError


def import_files(sources: Iterable[Path | tuple[Path, str]], dataset_dir: Path) -> list[Issue]:
    """Copies images and captions from files, folders and zips into a dataset.

    A folder keeps its name and structure, and a zip its structure. A source may be given with the
    name or relative path that the user knows; one file may be given several times with different
    names. Captions in a `metadata.jsonl` are saved as `<image>.txt`.

    Returns an issue for each file that was not imported or got another name. A bad zip is one
    issue, and nothing in it is imported. Raises `DatasetError` if `dataset_dir` cannot be written.
    """
    dataset_dir = Path(dataset_dir)
    issues: list[Issue] = []
    try:
        dataset_dir.mkdir(parents=True, exist_ok=True)
        # Inside the dataset, because nothing outside is ours to write. Hidden, so that a scan
        # ignores what a killed import leaves.
        with tempfile.TemporaryDirectory(prefix=".importing-", dir=dataset_dir) as work:
            files = []
            for number, source in enumerate(sources):
                path, name = source if isinstance(source, tuple) else (source, source.name)
                files += _collect(path, name, Path(work, str(number)), issues)
            DatasetImport(dataset_dir, issues).run(files)
    except OSError as error:
        raise DatasetError(
            f"{printable(dataset_dir)} cannot be written ({error.strerror}): make room or choose "
            "another folder."
        ) from error
    return issues


def _collect(source: Path, name: str, work: Path, issues: list[Issue]) -> list[SourceFile]:
    """Returns the files of one source. A zip is unpacked into `work`."""
    if source.is_symlink():
        problem: tuple[Level, str] | None = (
            "warning",
            "A link is not followed: import the file or folder itself.",
        )
    elif source.is_dir():
        return list(_walk(source, name.rstrip("/").rpartition("/")[2], issues))
    elif not source.exists():
        problem = "error", "The file no longer exists: import it again."
    elif not source.is_file():
        problem = "error", "A pipe or a device is not a file: it was not imported."
    else:
        problem = None
    if problem:
        level, message = problem
        issues.append(Issue(printable(name), level, message))
        return []

    if suffix_of(name) == ".zip" and "/" not in name:
        try:
            return unpack(source, name, work, issues)
        except DatasetError as error:
            issues.append(Issue(printable(name), "error", str(error)))
            return []
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    *folders, file_name = parts or ["picture"]
    return _single_file(SourceFile(source, tuple(folders), file_name), issues)


def _single_file(file: SourceFile, issues: list[Issue]) -> list[SourceFile]:
    """Returns a file that came with its folders, or nothing if `_walk` would ignore them."""
    if any(map(is_junk, file.folders)):
        return []
    if any(folder.startswith(".") for folder in file.folders):
        message = "The file is in a hidden folder: it was not imported."
        issues.append(Issue(file.file, "note", message))
        return []
    if len(file.folders) > MAX_DEPTH:
        issues.append(Issue(file.file, "warning", TOO_DEEP))
        return []
    return [file]


def _walk(source: Path, name: str, issues: list[Issue]) -> Iterator[SourceFile]:
    """Yields the files of a folder, and adds an issue for each folder or link it ignores."""
    waiting: list[tuple[Path, tuple[str, ...]]] = [(source, (name,))]
    while waiting:
        parent, folders = waiting.pop()
        try:
            entries = sorted(os.scandir(parent), key=lambda entry: entry.name)
        except OSError as error:
            message = f"The folder cannot be read: {error.strerror}."
            issues.append(Issue(printable("/".join(folders)), "error", message))
            continue
        for entry in entries:
            label = printable("/".join((*folders, entry.name)))
            if is_junk(entry.name):
                continue
            if entry.is_symlink():
                message = "A link is not followed: copy the file itself."
                issues.append(Issue(label, "warning", message))
            elif not entry.is_dir():
                yield SourceFile(parent / entry.name, folders, entry.name)
            elif entry.name.startswith("."):
                message = "The folder is hidden: it was not imported."
                issues.append(Issue(label, "note", message))
            elif len(folders) >= MAX_DEPTH:
                issues.append(Issue(label, "warning", TOO_DEEP))
            else:
                waiting.append((parent / entry.name, (*folders, entry.name)))

"""Dropped files, folders and zips become part of a dataset folder: copied, never altered, never overwriting.

Nothing is written outside that folder, no name is taken as it came, and only readable pictures and captions are kept.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from trainer.curation.import_copy import DatasetImport
from trainer.curation.import_names import MAX_DEPTH, TOO_DEEP, SourceFile
from trainer.curation.import_zip import unpack
from trainer.data.dataset_files import is_junk, suffix_of
from trainer.data.issues import Issue, shown
from trainer.errors import DatasetError


def import_files(sources: Iterable[Path | tuple[Path, str]], dataset_dir: Path) -> list[Issue]:
    """Copy pictures and captions out of files, folders and zips into `dataset_dir`; say what was left out or renamed.

    A dropped folder keeps its name and structure, a zip its structure. A source may come with the name, or relative
    path, the person knows it by; one file may come under several.
    Captions in a `metadata.jsonl` are saved as `<picture>.txt`. A bad zip is one finding and none of it is imported.
    Raises `DatasetError` when `dataset_dir` cannot be written.
    """
    dataset_dir = Path(dataset_dir)
    findings: list[Issue] = []
    try:
        dataset_dir.mkdir(parents=True, exist_ok=True)
        # Hidden, so that a scan passes over what a killed import leaves; inside, as nothing outside is ours to write.
        with tempfile.TemporaryDirectory(prefix=".importing-", dir=dataset_dir) as work:
            dropped = []
            for number, source in enumerate(sources):
                path, name = source if isinstance(source, tuple) else (source, source.name)
                dropped += _collect(path, name, Path(work, str(number)), findings)
            DatasetImport(dataset_dir, findings).place(dropped)
    except OSError as error:
        raise DatasetError(
            f"{shown(dataset_dir)} cannot be written ({error.strerror}): make room or choose another folder."
        ) from error
    return findings


# Collecting


def _collect(source: Path, name: str, work: Path, findings: list[Issue]) -> list[SourceFile]:
    try:
        if source.is_symlink():
            message = "Is a link, which is not followed: drop the file or folder itself."
            findings.append(Issue(shown(name), "warning", message))
        elif source.is_dir():
            return list(_walk(source, name.rstrip("/").rpartition("/")[2], findings))
        elif not source.exists():
            findings.append(Issue(shown(name), "error", "Is no longer there: drop it again."))
        elif not source.is_file():
            findings.append(
                Issue(
                    shown(name), "error", "Is a pipe or a device, not a file: it was not imported."
                )
            )
        elif suffix_of(name) == ".zip" and "/" not in name:
            return unpack(source, name, work, findings)
        else:
            *folders, file_name = [
                part for part in name.split("/") if part not in ("", ".", "..")
            ] or ["picture"]
            return _file_of_folder(SourceFile(source, tuple(folders), file_name), findings)
    except DatasetError as error:
        findings.append(Issue(shown(name), "error", str(error)))
    return []


def _file_of_folder(entry: SourceFile, findings: list[Issue]) -> list[SourceFile]:
    """A file that came with its folders, or nothing where `_walk` would not have gone into them."""
    if any(map(is_junk, entry.folders)):
        return []
    if any(folder.startswith(".") for folder in entry.folders):
        findings.append(Issue(entry.shown, "note", "Lies in a hidden folder: it was not imported."))
        return []
    if len(entry.folders) > MAX_DEPTH:
        findings.append(Issue(entry.shown, "warning", TOO_DEEP))
        return []
    return [entry]


def _walk(source: Path, name: str, findings: list[Issue]) -> Iterator[SourceFile]:
    waiting: list[tuple[Path, tuple[str, ...]]] = [(source, (name,))]
    while waiting:
        parent, folders = waiting.pop()
        try:
            entries = sorted(os.scandir(parent), key=lambda entry: entry.name)
        except OSError as error:
            findings.append(
                Issue(
                    shown("/".join(folders)),
                    "error",
                    f"The folder cannot be read: {error.strerror}.",
                )
            )
            continue
        for entry in entries:
            label = shown("/".join((*folders, entry.name)))
            if is_junk(entry.name):
                continue
            if entry.is_symlink():
                findings.append(
                    Issue(
                        label, "warning", "Is a link, which is not followed: copy the file itself."
                    )
                )
            elif entry.is_dir() and entry.name.startswith("."):
                findings.append(Issue(label, "note", "Is a hidden folder: it was not imported."))
            elif entry.is_dir() and len(folders) >= MAX_DEPTH:
                findings.append(Issue(label, "warning", TOO_DEEP))
            elif entry.is_dir():
                waiting.append((parent / entry.name, (*folders, entry.name)))
            else:
                yield SourceFile(parent / entry.name, folders, entry.name)

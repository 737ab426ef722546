"""Files that a person dropped on the page, on their way into a dataset."""

import os
from pathlib import Path

from app.actions import dataset_changes, datasets
from app.actions.records import AddedFiles, BrowserData, FileMessage, SavedMask
from trainer.errors import DatasetError


def add_files(data: BrowserData) -> AddedFiles:
    """Adds uploaded files to a dataset.

    `data` is {"dataset", "files": [{"path", "name"}]}: the path of the upload, and the name as it
    was dropped, with its folders.
    """
    dropped = []
    for file in data.get("files", []):
        upload = _upload(file.get("path"))
        name = str(file.get("name") or upload.name)
        dropped.append((upload, name.replace("\\", "/").replace("\0", "")))
    if not dropped:
        raise DatasetError("Nothing was dropped.")
    slug, issues = datasets.add(str(data.get("dataset") or ""), dropped)
    # Deleted last: Gradio stores equal files once, so two files of the list may be one upload.
    for upload, _ in dropped:
        upload.unlink(missing_ok=True)
    messages: list[FileMessage] = [
        {"file": issue.file, "level": issue.level, "text": issue.message} for issue in issues
    ]
    return {"name": slug, "messages": messages}


def add_mask(data: BrowserData) -> SavedMask:
    """Makes an uploaded image the mask of `file`."""
    upload = _upload(data.get("path"))
    try:
        return dataset_changes.put_mask(data, upload.read_bytes(), Path(upload.name))
    finally:
        upload.unlink(missing_ok=True)


def _upload(path: object) -> Path:
    """Returns the path of a file that came through the upload route. Refuses all others."""
    uploads = Path(os.environ["GRADIO_TEMP_DIR"]).resolve()
    if isinstance(path, str) and "\0" not in path:
        upload = Path(path)
        if upload.is_file() and upload.resolve().is_relative_to(uploads):
            return upload
    raise DatasetError("A dropped file did not arrive. Drop it again.")

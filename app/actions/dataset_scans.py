"""Scans datasets in the background and keeps the last scan of each in memory.

A page of images or a saved caption then needs no other file than those that it shows.
"""

import contextvars
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from app.actions import datasets
from app.actions.records import BrowserData
from trainer import config
from trainer.data import captions, dataset_files
from trainer.data import scan as dataset_scan
from trainer.data.issue import Issue
from trainer.errors import ConfigError, TrainerError
from trainer.models import model_files

PATIENCE = 1.0
"""Seconds that a scan may take before its progress is shown instead of its result."""
SETTINGS = (
    "resolution",
    "bucket_step",
    "max_aspect",
    "allow_upscale",
    "crop",
    "trigger",
    "caption_tokens",
)
"""The settings of the Train tab that decide what is shown of an image."""


@dataclass
class DatasetScan:
    """A scan of a dataset, which may still be at work."""

    settings: config.Dataset
    base: str
    """The base model, whose tokenizer counts the tokens of captions."""
    signature: int = 0
    """The signature of the dataset when the scan began."""
    done: int = 0
    total: int = 0
    items: list[dataset_scan.DatasetItem] = field(default_factory=list)
    issues: list[Issue] = field(default_factory=list)
    captions: dict[str, str] = field(default_factory=dict)
    """As in the files, with separate lines, by the printable path of the image."""
    error: str = ""
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def tokenizer(self) -> Path | None:
        return tokenizer_of(self.base)


scans: dict[Path, DatasetScan] = {}
"""The last scan of each dataset folder."""
_starting = threading.Lock()


def settings_of(data: BrowserData) -> tuple[config.Dataset, str]:
    """Returns the settings of the Train tab and the base that a script sent.

    Returns the defaults if the settings are wrong: the Train tab shows what is wrong with them.
    """
    sent = data.get("settings")
    settings: Mapping[str, object] = sent if isinstance(sent, dict) else {}
    values = {name: settings[name] for name in SETTINGS if name in settings}
    try:
        return config.from_dict({"dataset": values}).dataset, str(settings.get("base") or "")
    except ConfigError:
        return config.Dataset(), ""


def tokenizer_of(base: str) -> Path | None:
    """Returns the tokenizer folder of a base model, or None if it is not on this machine."""
    try:
        folder = model_files.locate(config.Base(model=base or config.EMBEDDED))
    except TrainerError:
        return None
    if folder is None or not (folder / "tokenizer").is_dir():
        return None
    return folder / "tokenizer"


def scan(data: BrowserData, again: bool = True) -> DatasetScan:
    """Returns the scan of a dataset. A scan that takes longer than PATIENCE has not ended yet.

    Args:
        data: The request of a script, with the dataset and the settings.
        again: Whether to scan the dataset again if a file has changed since the last scan.
    """
    folder = datasets.resolve(data.get("dataset"))
    settings, base = settings_of(data)
    with _starting:
        known = scans.get(folder)
        if known and _is_usable(known, folder, settings, base, again):
            current = known
        else:
            current = DatasetScan(settings, base, datasets.signature(folder))
            scans[folder] = current
            # The context of the request determines whose outputs folder is used.
            run = contextvars.copy_context().run
            threading.Thread(target=run, args=(_scan, folder, current), daemon=True).start()
    current.ended.wait(PATIENCE)
    return current


def finished_scan(data: BrowserData, again: bool = True) -> DatasetScan:
    """Returns the scan of a dataset as `scan` does, and waits for its end."""
    current = scan(data, again)
    current.ended.wait()
    return current


def _is_usable(
    known: DatasetScan, folder: Path, settings: config.Dataset, base: str, again: bool
) -> bool:
    if (known.settings, known.base) != (settings, base):
        return False
    if not again or not known.ended.is_set():
        return True
    return known.signature == datasets.signature(folder)


def _scan(folder: Path, current: DatasetScan) -> None:
    def progress(done: int, total: int) -> None:
        current.done, current.total = done, total

    try:
        result = _scan_dataset(folder, current, progress)
        current.items, current.issues = result.items, result.issues
        current.captions = read_captions(folder, (item.path for item in current.items))
    except (TrainerError, OSError) as error:
        current.error = "" if _is_empty(folder) else str(error)
    finally:
        current.ended.set()


def _scan_dataset(
    folder: Path, current: DatasetScan, progress: Callable[[int, int], None]
) -> dataset_scan.Scan:
    return dataset_scan.scan_dataset(
        folder, current.settings, tokenizer=current.tokenizer, progress=progress
    )


def _is_empty(folder: Path) -> bool:
    if not folder.is_dir():
        return True
    return not any(path.is_file() for path in dataset_files.files_of(folder))


def read_captions(folder: Path, images: Iterable[Path]) -> dict[str, str]:
    """Returns captions as they are on the disk now, by the printable path of the image."""
    metadata = captions.MetadataCaptions(folder)
    found = {}
    for image in images:
        caption, _ = captions.caption_of(image, folder, metadata, separate_lines=True)
        found[dataset_files.relative(image, folder)] = caption
    return found

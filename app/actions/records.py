"""What actions return to the page, as the scripts in `app/static` read it.

Every record becomes JSON.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from app.views.records import FileLink, Point

BrowserData = Mapping[str, Any]
"""What a script sent. Every value must be checked."""


# Library


class ComparisonSide(TypedDict):
    """One of two runs that are compared."""

    name: str
    steps: int
    loss: list[Point]
    validation: list[Point]
    sample: str
    prompt: str


class Comparison(TypedDict):
    """Two runs side by side, drawn by library.js."""

    settings: Sequence[Mapping[str, object]]
    """The settings that differ, as `form.differences` returns them."""
    runs: list[ComparisonSide]


class SizedFile(FileLink):
    """A file to download with its size as a text."""

    size: str


class ToolProgress(TypedDict):
    progress: list[int]
    """Layers that are done, and all layers."""


class AdapterDescription(TypedDict):
    facts: dict[str, Any]
    """What `python -m trainer info --json` printed."""


class MadeFile(TypedDict):
    file: SizedFile
    kept: str
    """The share of the adapter that a smaller rank keeps, "" if the rank stayed the same."""
    worst: str
    """The layer that loses most."""


# Train


class Fix(TypedDict, total=False):
    """A change that one click makes: the label of the button, and one of the other keys."""

    label: str
    changes: dict[str, Any]
    """New values of settings, by dotted path."""
    go: str
    """The tab to open."""
    example: str
    """The example dataset to use."""
    base: str
    """The base model to use."""
    reset: list[str]
    """The settings to reset to the preset."""


class _Check(TypedDict):
    level: str
    """bad (forbids the start), warn or quiet"""
    text: str


class Check(_Check, total=False):
    """A line of the list above the Start button."""

    cure: Fix


class MemoryPhase(TypedDict):
    name: str
    text: str
    """Gigabytes."""
    share: float
    """Of the device's memory, or of the largest phase if that is larger."""


class MemoryView(TypedDict):
    """How much memory each phase of a run needs."""

    phases: list[MemoryPhase]
    total: str
    """The memory of the device, "" if it is unknown."""
    worst: str
    peak: str
    fits: bool


class Estimate(TypedDict):
    """How many steps a run has, and how long it takes."""

    sum: str
    steps: str
    time: str
    facts: list[str]


class PreflightView(TypedDict, total=False):
    """What is above the Start button, drawn by estimate.js.

    The run can start if "steps" is present and no check is "bad".
    """

    sum: str
    steps: str
    time: str
    facts: list[str]
    memory: MemoryView
    checks: list[Check]
    refused: str
    started: str


# Dataset


class FileMessage(TypedDict):
    """A message about a file that was added."""

    file: str
    level: str
    """error, warning or note"""
    text: str


class AddedFiles(TypedDict):
    name: str
    """The dataset."""
    messages: list[FileMessage]


class Undoable(TypedDict):
    undo: str
    """What Undo would take back, "" if nothing."""


class IssueFix(TypedDict):
    name: str
    label: str


class IssueFile(TypedDict):
    file: str
    text: str


class IssueGroup(TypedDict):
    """All issues of one kind."""

    kind: str
    title: str
    level: str
    """error, warning or note"""
    count: int
    files: list[IssueFile]
    cures: list[IssueFix]


class CropView(TypedDict):
    """The part of an image that is used in training."""

    box: list[float]
    """Left, top, right and bottom edge, from 0 to 1."""
    bucket: list[int]
    """Width and height in pixels."""
    moved: bool
    """Whether a person moved it."""


class MovedCrop(CropView, Undoable):
    """A crop that a person just moved."""


class ImageCard(CropView):
    """An image of a dataset."""

    file: str
    caption: str
    tokens: int
    size: str
    ratio: float
    src: str
    large: str
    mask: str
    repeats: int


class Example(TypedDict):
    id: str
    title: str


class ScanProgress(TypedDict):
    done: int
    total: int


class _DatasetView(TypedDict):
    name: object
    examples: list[Example]
    cards: list[ImageCard]
    groups: list[IssueGroup]
    total: int


class DatasetView(_DatasetView, total=False):
    """A page of images, drawn by dataset.js."""

    scanning: ScanProgress
    """Present while the dataset is being scanned."""
    trouble: str
    """Present if the dataset cannot be used."""
    matching: int
    page: int
    pages: int
    verdict: str
    bare: int
    """How many captions are empty."""
    left_out: int
    """How many files cannot be used."""
    tags: list[tuple[str, int]]
    undo: str
    limit: int
    """The most tokens that are read of a caption."""


class BucketRow(TypedDict):
    size: str
    count: int
    ratio: float


class CropsOverview(TypedDict):
    buckets: list[BucketRow]
    crop: str
    resolution: int


class SavedCaption(Undoable):
    caption: str
    tokens: int


class SavedMask(Undoable):
    mask: str
    """The URL of the mask, "" if there is none."""


class RemovedImage(Undoable):
    ok: bool


class ChangedCaption(TypedDict):
    file: str
    before: str
    after: str


class EditPreview(TypedDict):
    """What a change of all captions would do."""

    count: int
    changes: list[ChangedCaption]
    """The first of them."""


class ChangeCount(TypedDict):
    changed: int


class Undone(TypedDict):
    label: str
    kept: list[str]
    """Files that were changed by another program since, and stay as they are."""


class CaptionResult(TypedDict):
    file: str
    caption: str


class _CaptioningStatus(TypedDict):
    state: str
    """none, running, done or failed"""
    done: int
    total: int
    latest: list[CaptionResult]
    warnings: list[str]
    message: str


class CaptioningStatus(_CaptioningStatus, total=False):
    """A captioning job, drawn by dataset/auto_caption.js."""

    loading: bool
    """Whether the model is still being loaded."""


class DownloadSize(TypedDict):
    bytes: int
    text: str

"""The data of each view, as the scripts in `app/static` read it.

Every record becomes JSON. A view without content is an empty object.
"""

from typing import TypedDict

Point = tuple[int, float]
"""A step and a value at this step."""


class EmptyView(TypedDict):
    """The data of a view that has nothing to show."""


class FileLink(TypedDict):
    """A file to download. `href` is relative to the page."""

    href: str
    name: str


class AdapterFile(FileLink):
    """The adapter file of a run."""

    size: str
    embedding: FileLink | None
    """The embedding of the trigger word, if one was trained."""


class Gauge(TypedDict):
    """Whether a run still learns, is ready or memorises its images."""

    zone: str
    """learning, ready or memorising"""
    needle: float
    """Position on the gauge, from 0 (learning) to 1 (memorising)."""
    sentence: str
    changes: list[str]
    """What to change for another run."""


class _Header(TypedDict):
    device: str
    text: str
    tone: str


class HeaderView(_Header, total=False):
    """The line above the tabs, drawn by header.js."""

    busy: bool
    run: str
    name: str
    state: str


class QueuedRun(TypedDict):
    run: str
    name: str


class Measurements(TypedDict, total=False):
    """Texts of what is measured during a training. "" hides a figure."""

    validation: str
    images: str
    """Images per second."""
    rate: str
    """Learning rate."""
    memory: str
    memory_of: str
    """The label of `memory`."""
    use: str
    """Utilisation of the GPU or CPU."""


class ProgressView(Measurements):
    """The status card of the Train tab, drawn by progress.js."""

    run: str
    name: str
    state: str
    label: str
    tone: str
    busy: bool
    phase: str
    share: float
    """How full the progress bar is, from 0 to 1."""
    step: int
    total: int
    left: str
    speed: str
    loss: str
    took: str
    message: str
    gauge: Gauge | None
    ended_early: str
    warnings: list[str]
    actions: list[str]
    report: str
    file: AdapterFile | None
    details: str
    queue: list[QueuedRun]


class CurveView(TypedDict):
    """Losses over steps, drawn by curve.js."""

    total: int
    loss: list[Point]
    smooth: list[Point]
    validation: list[Point]
    training: list[Point]
    """Loss on training images at the noise of the validation."""
    rates: list[Point]
    saves: list[int]
    best: int | None


class LearnedView(TypedDict):
    """The contents of learned.json, drawn by learned.js."""

    run: str
    blocks: list[tuple[str, float]]
    """Block and norm of its change."""
    rank: int
    spectrum: list[float]
    """Share of the squared singular values, by rank."""
    enough: dict[str, int]
    """The rank that keeps "95" or "99" percent."""
    modules: list[tuple[str, int, int, int]]
    """Module, its rank, and the ranks that keep 95 and 99 percent."""


class SampleImage(TypedDict):
    step: int
    src: str


class ProbeImage(SampleImage):
    """A sample of a prompt without its trigger word."""

    leak: float | None


class SampleRow(TypedDict):
    prompt: str
    seed: int
    pictures: list[SampleImage]


class ProbeRow(TypedDict):
    prompt: str
    seed: int
    pictures: list[ProbeImage]


class SamplesView(TypedDict):
    """The samples of a run, drawn by samples.js."""

    best: int | None
    active: bool
    without: ProbeRow | None
    """Samples without the trigger word."""
    likeness: list[Point]
    """Likeness of the samples to the nearest training image."""
    between: float | None
    """Likeness of the training images to each other."""
    rows: list[SampleRow]


class RunCard(TypedDict):
    """A run in the Library."""

    run: str
    name: str
    label: str
    tone: str
    preset: str
    steps: str
    best: int | None
    date: str
    sample: str
    prompt: str
    file: AdapterFile | None
    actions: list[str]
    settings: str
    fault: str
    report: str
    folder: str
    can_preview: bool
    trigger: str
    gauge: Gauge | None
    base: str
    given: str
    """The name that the run was given in the Library, "" if it was not renamed."""
    tags: list[str]


class LibraryView(TypedDict):
    """All runs as cards, drawn by library.js."""

    cards: list[RunCard]
    cache: str
    """The size of the caches."""

"""The samples of a run."""

from pathlib import Path

from app.jobs import runs
from app.views import files
from app.views.records import EmptyView, ProbeRow, SampleImage, SampleRow, SamplesView
from trainer.runs.events import Probed, SampleSaved
from trainer.runs.run_status import RunStatus


def samples_view() -> SamplesView | EmptyView:
    """Returns the samples of the run that is shown, a row per prompt, each with the base first."""
    folder = runs.shown()
    if folder is None:
        return {}
    current = runs.status(folder)
    likeness = [
        (probe.step, round(probe.likeness, 3))
        for probe in current.probes
        if probe.likeness is not None
    ]
    return {
        "best": current.best_step,
        "active": current.is_active,
        "without": _row_without_trigger(folder, current.probes),
        "likeness": likeness,
        "between": _likeness_between_images(current),
        "rows": _rows(folder, current.samples),
    }


def _rows(folder: Path, samples: list[SampleSaved]) -> list[SampleRow]:
    rows: dict[tuple[str, int], SampleRow] = {}
    for sample in samples:
        key = (sample.prompt, sample.seed)
        if key not in rows:
            rows[key] = {"prompt": sample.prompt, "seed": sample.seed, "pictures": []}
        rows[key]["pictures"].append(_image(folder, sample))
    return list(rows.values())


def _row_without_trigger(folder: Path, probes: list[Probed]) -> ProbeRow | None:
    """Returns the samples of the first prompt without its trigger word."""
    sampled = [probe for probe in probes if probe.file]
    if not sampled:
        return None
    return {
        "prompt": sampled[0].prompt,
        "seed": sampled[0].seed,
        "pictures": [{**_image(folder, probe), "leak": probe.leak} for probe in sampled],
    }


def _image(folder: Path, sample: SampleSaved | Probed) -> SampleImage:
    return {"step": sample.step, "src": files.href(folder, sample.file)}


def _likeness_between_images(current: RunStatus) -> float | None:
    for probe in current.probes:
        if probe.likeness_between is not None:
            return round(probe.likeness_between, 3)
    return None

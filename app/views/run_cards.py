"""The runs of the Library as cards."""

from datetime import datetime
from functools import lru_cache
from pathlib import Path

from app.jobs import run_actions, runs
from app.jobs.ttl_cache import ttl_cached
from app.settings import own_presets
from app.views import files, formatting, labels
from app.views.gauge import gauge
from app.views.records import LibraryView, RunCard
from app.views.run_notes import read_notes
from trainer.errors import TrainerError
from trainer.runs import cache_limits, run_folder
from trainer.runs.run_status import RunStatus

CACHE_SIZE_AGE = 60.0  # seconds


def library_view() -> LibraryView:
    """Returns all runs as cards, newest first."""
    titles = preset_titles()
    cards = [_card(folder, titles) for folder in runs.all_runs()]
    return {"cards": cards, "cache": cache_size()}


@ttl_cached(CACHE_SIZE_AGE, key=run_folder.outputs_folder)
def cache_size() -> str:
    """Returns the size of the caches, which are many files, as a text."""
    return formatting.file_size(cache_limits.size())


def preset_titles() -> dict[str, str]:
    """Returns the titles of all presets by name. Reads a person's presets only if they changed."""
    return _read_preset_titles(own_presets.folder(), _preset_versions(own_presets.folder()))


def _preset_versions(folder: Path) -> frozenset[tuple[str, int, int]]:
    """Returns name, size and time of the last change of each preset that a person saved."""
    versions = set()
    for path in folder.glob("own-*.toml"):
        try:
            file = path.stat()
        except OSError:  # deleted meanwhile
            continue
        versions.add((path.name, file.st_size, file.st_mtime_ns))
    return frozenset(versions)


@lru_cache(maxsize=32)
def _read_preset_titles(folder: Path, versions: frozenset[tuple[str, int, int]]) -> dict[str, str]:
    return {name: preset.title for name, preset in own_presets.all_presets().items()}


def _card(folder: Path, preset_titles: dict[str, str]) -> RunCard:
    current = runs.status_without_curves(folder)
    samples = files.samples_of_adapter(current)
    created = datetime.fromtimestamp((folder / "run.toml").stat().st_mtime)
    try:
        run = runs.settings(folder)
        settings, fault = runs.settings_text(folder), ""
    except TrainerError as error:
        run, settings, fault = None, "", str(error)
    preset = preset_titles.get(run.preset) if run else None
    notes = read_notes(folder)
    return {
        "run": folder.name,
        "name": run.name if run else folder.name,
        "label": labels.state_label(folder, current),
        "tone": labels.tone(current),
        "preset": preset or "Own settings",
        "steps": "" if current.is_active else f"{current.step} steps",
        "best": _best_of_several(current),
        "date": f"{created.day} {created:%B %Y, %H:%M}",
        "sample": files.href(folder, samples[0].file) if samples else "",
        "prompt": samples[0].prompt if samples else "",
        "file": files.adapter_file(folder, current),
        "actions": sorted(run_actions.available(current)),
        "settings": settings,
        "fault": fault or current.message,
        "report": files.report_href(folder, current),
        "folder": str(folder),
        "can_preview": bool(current.adapters),
        "trigger": run.dataset.trigger if run else "",
        "gauge": gauge(folder, current),
        "base": run.base.model if run else "",
        "given": notes["name"],
        "tags": notes["tags"],
    }


def _best_of_several(current: RunStatus) -> int | None:
    return current.best_step if len(current.adapters) > 1 else None

"""What a run will take, in words: steps, time, parameters, and memory by phase."""

from collections.abc import Sequence
from pathlib import Path

from app.actions.records import Estimate, MemoryPhase, MemoryView
from app.jobs import device, runs
from app.views import formatting
from trainer.config import RunConfig
from trainer.data import scan
from trainer.training import estimate

MEMORY_SHARE = 0.94
"""The share of the device's memory that a run may plan with."""
PHASES = {"load": "Loading", "cache": "Reading", "step": "Training", "sample": "Samples"}
"""Titles of the fields of `estimate.Memory`."""
RUNS_TO_MEASURE = 20
"""How many of the latest runs are searched for the speed of similar settings."""


def estimate_line(run: RunConfig, items: Sequence[scan.DatasetItem]) -> Estimate:
    """Returns the number of steps, the time and other facts about a run on these images."""
    repeated = scan.override_repeats(list(items), Path(run.dataset.folder), run.dataset.repeats)
    steps = estimate.steps_for(run, [item.repeats for item in repeated])
    validation_images = scan.held_out_count(run, len(items))
    training_images = len(items) - validation_images
    return {
        "sum": f"{training_images} images{_passes(run)}{_batches(run)} = ",
        "steps": f"{steps:,} steps",
        "time": _time(run, steps),
        "facts": _facts(run, validation_images),
    }


def _passes(run: RunConfig) -> str:
    """Returns how often each image is seen, such as " × 100 views × 2 resolutions"."""
    text = "" if run.training.steps else f" × {run.training.views_per_picture} views"
    if run.dataset.resolutions:
        text += f" × {len(scan.resolutions(run))} resolutions"
    return text


def _batches(run: RunConfig) -> str:
    batch = run.training.images_per_step
    return f" in batches of {batch}" if batch > 1 else ""


def _time(run: RunConfig, steps: int) -> str:
    """Returns the duration, from the speed of a similar run if there was one."""
    seconds = estimate.measured_seconds_per_step(run, runs.all_runs()[:RUNS_TO_MEASURE])
    if seconds:
        return f"in {formatting.duration(seconds * steps)} on this device"
    seconds = estimate.expected_seconds_per_step(run, device.kind(), device.cores())
    duration = formatting.duration(seconds * steps)
    return f"in roughly {duration}; the first steps give a better estimate"


def _facts(run: RunConfig, validation_images: int) -> list[str]:
    rate = run.training.learning_rate or run.training.text_encoder_learning_rate
    facts = [f"learning rate {rate:g}"]
    parameters = estimate.trainable_parameters(run)
    if parameters is not None:
        size = formatting.file_size(estimate.file_bytes(run))
        facts.append(f"{formatting.short_number(parameters)} parameters, {size} file")
    if validation_images:
        facts.append(f"{validation_images} more for validation")
    return facts


def memory_view(needs: estimate.Memory) -> MemoryView:
    """Returns the memory that each phase needs, and the memory of the device."""
    usage = device.usage()
    scale = max(usage.total, needs.peak) or 1
    phases: list[MemoryPhase] = []
    for phase, title in PHASES.items():
        needed = getattr(needs, phase)
        phases.append({"name": title, "text": f"{needed / 1e9:.1f}", "share": needed / scale})
    return {
        "phases": phases,
        "total": f"{usage.total / 1e9:.0f} GB" if usage.total else "",
        "worst": PHASES[needs.worst],
        "peak": f"{needs.peak / 1e9:.1f} GB",
        "fits": not usage.total or needs.peak <= usable_memory(usage),
    }


def usable_memory(usage: device.Usage) -> float:
    """Returns how many bytes of the device's memory a run may plan with."""
    return usage.total * MEMORY_SHARE

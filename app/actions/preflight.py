"""What is checked before a run starts: a list of problems, most with a fix that one click makes."""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from app.actions import datasets
from app.actions.records import Check, Fix, PreflightView
from app.actions.run_estimate import estimate_line, memory_view, usable_memory
from app.jobs import device, runs
from app.settings import form
from app.views import formatting
from trainer import config
from trainer.config import EMBEDDED, RunConfig
from trainer.config.presets import Preset
from trainer.data import scan
from trainer.data.issue import Issue
from trainer.errors import TrainerError
from trainer.models.model_files import locate
from trainer.runs import run_folder
from trainer.training import estimate

FEW_IMAGES = 5
MIN_VIEWS = 5
MIN_RESOLUTION = 16
SPARE_DISK = 1e9  # bytes
SMALL = 0.9
"""An image is small if its side is below this share of the resolution."""
DOWNLOAD_BYTES = 2
"""Bytes of a parameter in the files that are downloaded."""
TO_DATASET: Fix = {"label": "Go to Dataset", "go": "dataset"}
TO_EMBEDDED_BASE: Fix = {"label": "Take the built-in base", "base": EMBEDDED}


def check(level: str, text: str, fix: Fix | None = None) -> Check:
    """Returns a line of the list. A check of the level "bad" forbids the start."""
    return {"level": level, "text": text, "cure": fix} if fix else {"level": level, "text": text}


def view(run: RunConfig, dataset: str, preset: Preset | None) -> PreflightView:
    """Returns what is drawn above the Start button: estimate, memory and checks.

    Args:
        run: The settings of the form.
        dataset: The name of the dataset.
        preset: The preset that is chosen, if it still exists.
    """
    if not run.dataset.folder:
        return {"checks": [_no_dataset_check()]}
    try:
        items, issues = datasets.scan(dataset)
        line = estimate_line(run, items)
        needs = estimate.memory(run, device.kind())
    except TrainerError as error:
        return {"checks": [check("bad", str(error))]}
    checks = _tracking_checks(run)
    if not device.trains_elsewhere:
        checks += _device_checks(run, needs)
    checks += _base_checks(run)
    checks += _disk_checks(run)
    checks += _image_checks(run, items, issues)
    checks += _length_checks(run, len(items), preset)
    return {
        "sum": line["sum"],
        "steps": line["steps"],
        "time": line["time"],
        "facts": line["facts"],
        "memory": memory_view(needs),
        "checks": checks,
    }


def _no_dataset_check() -> Check:
    fix: Fix | None = None
    for example in datasets.examples()[:1]:
        fix = {"label": "Take an example", "example": example["id"]}
    text = "Add images on the Dataset tab first, or try everything out with an example."
    return check("quiet", text, fix)


# This machine


def _tracking_checks(run: RunConfig) -> list[Check]:
    name = run.saving.tracking
    if name == "none" or find_spec(name):
        return []
    text = f"The package {name} is not installed: pip install {name}."
    return [check("bad", text, _change("Do without", {"saving.tracking": "none"}))]


def _change(label: str, changes: Mapping[str, Any]) -> Fix:
    return {"label": label, "changes": form.to_widgets(changes)}


def _device_checks(run: RunConfig, needs: estimate.Memory) -> list[Check]:
    return [*_count_checks(run), *_quantization_checks(run), *_memory_checks(run, needs)]


def _count_checks(run: RunConfig) -> list[Check]:
    """Checks the number of GPUs. Without a GPU, several processes may share the machine."""
    available = device.count()
    if run.training.devices <= available or not device.has_cuda():
        return []
    text = f"The settings require {run.training.devices} GPUs; this machine has {available}."
    return [check("bad", text, _change(f"Use {available}", {"training.devices": available}))]


def _quantization_checks(run: RunConfig) -> list[Check]:
    bits = run.base.quantization
    if bits == "none":
        return []
    if not device.has_cuda():
        missing = "an NVIDIA GPU"
    elif not find_spec("bitsandbytes"):
        missing = "a package: pip install bitsandbytes"
    else:
        return []
    text = f"A base in {bits.replace('bit', ' bits')} needs {missing}."
    return [check("bad", text, _change("Keep the base whole", {"base.quantization": "none"}))]


def _memory_checks(run: RunConfig, needs: estimate.Memory) -> list[Check]:
    usage = device.usage()
    if not usage.total:
        return []
    needed = f"This needs about {needs.peak / 1e9:.1f} GB"
    if needs.peak > usable_memory(usage):
        name = "GPU" if device.has_cuda() else "machine"
        text = f"{needed}; the {name} has {usage.total / 1e9:.1f} GB."
        return [_memory_fix(run, text, usable_memory(usage))]
    # A run that trains now frees its memory before the next one starts.
    if needs.peak > usage.free and runs.active() is None:
        free = f"{usage.free / 1e9:.1f} GB are free now"
        return [check("warn", f"{needed}; {free}. Close other programs, or let it wait.")]
    return []


def _memory_fix(run: RunConfig, text: str, available: float) -> Check:
    """Returns the check with the changes that reduce the memory most, if there are any."""
    changes = estimate.fit(run, device.kind(), available)
    if not changes:
        return check("warn", f"{text} Choose a smaller base or resolution.")
    changed = config.replace(run, changes)
    if estimate.memory(changed, device.kind()).peak > available:
        text = f"{text} Even so it may be too little."
    return check("warn", text, _change("Fit to my device", changes))


def _base_checks(run: RunConfig) -> list[Check]:
    """Checks whether a base that is not on this machine can be downloaded."""
    if locate(run.base) is not None:
        return []
    model = run.base.model
    if os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "TRUE", "yes"):
        text = f"{model} is not on this machine, and downloads are switched off (HF_HUB_OFFLINE)."
        return [check("bad", text, TO_EMBEDDED_BASE)]
    needed = DOWNLOAD_BYTES * sum(estimate.size_of(run).parameters.values())
    size = formatting.file_size(int(needed))
    if shutil.disk_usage(run_folder.outputs_folder()).free < needed + SPARE_DISK:
        text = f"{model} has about {size}, more than the disk has room for."
        return [check("bad", text, TO_EMBEDDED_BASE)]
    return [check("quiet", f"{model} is downloaded first, about {size}.")]


def _disk_checks(run: RunConfig) -> list[Check]:
    """Checks the space for checkpoints, saves, samples and caches."""
    need = estimate.disk_bytes(run)
    run_folder.outputs_folder().mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(run_folder.outputs_folder()).free
    if free > need + SPARE_DISK / 2:
        return []
    fix = _change("Keep one save", {"saving.saves": 1}) if run.saving.saves > 1 else None
    text = (
        f"The run writes about {formatting.file_size(int(need))}, "
        f"and the disk has {formatting.file_size(free)} left."
    )
    return [check("bad", text, fix)]


# The images


def _image_checks(
    run: RunConfig, items: Sequence[scan.DatasetItem], issues: Sequence[Issue]
) -> list[Check]:
    checks = []
    if len(items) < FEW_IMAGES:
        images = "1 image" if len(items) == 1 else f"{len(items)} images"
        text = f"Only {images}: ten or more varied ones give a far better result."
        checks.append(check("warn", text, TO_DATASET))
    without_caption = sum(not item.caption.strip() for item in items)
    if without_caption and not run.dataset.trigger:
        text = f"{without_caption} of {len(items)} images have no caption."
        checks.append(check("warn", text, TO_DATASET))
    unusable = sum(issue.level == "error" for issue in issues)
    if unusable:
        files = "1 file cannot" if unusable == 1 else f"{unusable} files cannot"
        text = f"{files} be used in training; the Dataset tab shows why."
        checks.append(check("warn", text, TO_DATASET))
    return checks + _size_checks(run, items)


def _size_checks(run: RunConfig, items: Sequence[scan.DatasetItem]) -> list[Check]:
    """Suggests a lower resolution if most images are smaller than the present one."""
    resolution, step = run.dataset.resolution, run.dataset.bucket_step
    sides = sorted((item.width * item.height) ** 0.5 for item in items)
    small = sum(side < resolution * SMALL for side in sides)
    if small <= len(items) / 2 or run.dataset.allow_upscale:
        return []
    suggested = int(sides[len(sides) // 2]) // step * step
    if suggested < max(MIN_RESOLUTION, step):
        return []
    text = (
        f"{small} of {len(items)} images are smaller than {resolution} pixels "
        "and are trained as they are."
    )
    return [
        check("quiet", text, _change(f"Train at {suggested}", {"dataset.resolution": suggested}))
    ]


def _length_checks(run: RunConfig, images: int, preset: Preset | None) -> list[Check]:
    """Suggests fewer views of each image if there are far more images than the preset is for."""
    if preset is None or run.training.steps:
        return []
    if run.training.views_per_picture != preset.config.training.views_per_picture:
        return []
    numbers = re.findall(r"\d+", preset.pictures)
    if not numbers or images <= 2 * int(numbers[-1]):
        return []
    fewer = round(run.training.views_per_picture * int(numbers[-1]) / images)
    views = max(MIN_VIEWS, fewer)
    text = f"{images} images are many for this preset: each may be seen less often."
    return [
        check("quiet", text, _change(f"{views} views each", {"training.views_per_picture": views}))
    ]

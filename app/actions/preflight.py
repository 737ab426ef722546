"""What is said before the start: one line of what a run takes, its memory by phase, and a list of what stands in the way, with cures.

A cure is a change of fields by dotted path, which one click makes.
"""

import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from app.actions import datasets
from app.jobs import device, runs
from app.settings import form
from app.views import run_view
from trainer import config
from trainer.config import EMBEDDED, RunConfig
from trainer.config.presets import Preset
from trainer.data import scan
from trainer.data.splits import held_out_count, resolutions
from trainer.errors import TrainerError
from trainer.models.model_files import locate
from trainer.runs import run_folder
from trainer.training import estimate

FEW_IMAGES = 5
ROOM = 0.94  # share of the free memory that a run may plan with
SPARE_DISK = 1e9  # bytes
PHASES = {"load": "Loading", "cache": "Reading", "step": "Training", "sample": "Samples"}
SMALL = 0.9  # share of the wished side below which a picture is small


def check(level: str, text: str, cure: str = "", **what: Any) -> dict:
    """One line of the list. `level` "bad" forbids the start; `what` is the cure: changes={path: value} or go="dataset" or example=name."""
    return {"level": level, "text": text, **({"cure": {"label": cure, **what}} if cure else {})}


def view(run: RunConfig, folder_name: str, recipe: Preset | None) -> dict:
    """All that is drawn above the Start button. A start is possible where "steps" is in it and no check is bad."""
    if not run.dataset.folder:
        first = next(iter(datasets.examples()), None)
        cure = {"cure": "Take an example", "example": first["id"]} if first else {}
        cures = [
            check(
                "quiet",
                "Add pictures on the Dataset tab first, or try everything out with an example.",
                **cure,
            )
        ]
        return {"checks": cures}
    try:
        items, findings = datasets.scan(
            folder_name, run.dataset.resolution, caption_tokens=run.dataset.caption_tokens
        )
        seconds, is_measured = _seconds_per_step(run)
        line = _line(run, items, seconds, is_measured)
        needs = estimate.memory(run, device.kind())
    except TrainerError as error:
        return {"checks": [check("bad", str(error))]}
    checks = [
        *_tracking_checks(run),
        *([] if device.trains_elsewhere else _device_checks(run, needs)),
        *_base_checks(run),
        *_disk_checks(run),
        *_picture_checks(run, items, findings, recipe),
    ]
    return line | {"memory": _memory_view(needs), "checks": checks}


def _seconds_per_step(run: RunConfig) -> tuple[float, bool]:
    seconds = estimate.measured_seconds_per_step(run, runs.all_runs()[:20])
    return (
        (seconds, True)
        if seconds
        else (estimate.expected_seconds_per_step(run, device.kind(), device.cores()), False)
    )


def _line(run: RunConfig, items: list, seconds: float, is_measured: bool) -> dict:
    training = run.training
    repeated = scan.override_repeats(items, Path(run.dataset.folder), run.dataset.repeats)
    steps = estimate.steps_for(run, [item.repeats for item in repeated])
    batch = training.batch_size * training.gradient_accumulation_steps
    held_out = held_out_count(run, len(items))
    views_text = "" if training.steps else f" × {training.views_per_picture} views"
    if run.dataset.resolutions:
        views_text += f" × {len(resolutions(run))} resolutions"
    batch_text = f" in batches of {batch}" if batch > 1 else ""
    took = run_view.duration(seconds * steps)
    facts = [f"learning rate {training.learning_rate or training.text_encoder_learning_rate:g}"]
    parameters = estimate.trainable_parameters(run)
    if parameters is not None:
        facts.append(
            f"{run_view.count(parameters)} parameters, {run_view.size(estimate.file_bytes(run))} file"
        )
    if held_out:
        facts.append(f"{held_out} more held out for measuring")
    return {
        "sum": f"{len(items) - held_out} pictures{views_text}{batch_text} = ",
        "steps": f"{steps:,} steps",
        "time": f"in {took} on this device"
        if is_measured
        else f"in roughly {took}; the first steps will tell",
        "facts": facts,
    }


def _memory_view(needs: estimate.Memory) -> dict:
    usage = device.usage()
    scale = max(usage.total, needs.peak) or 1
    return {
        "phases": [
            {
                "name": title,
                "text": f"{getattr(needs, phase) / 1e9:.1f}",
                "share": getattr(needs, phase) / scale,
            }
            for phase, title in PHASES.items()
        ],
        "total": f"{usage.total / 1e9:.0f} GB" if usage.total else "",
        "worst": PHASES[needs.worst],
        "peak": f"{needs.peak / 1e9:.1f} GB",
        "fits": not usage.total or needs.peak <= usage.total * ROOM,
    }


def fitting(run: RunConfig) -> dict[str, Any]:
    """Changes that make a run fit the device that is there, as far as anything does."""
    usage = device.usage()
    return estimate.fit(run, device.kind(), usage.total * ROOM) if usage.total else {}


def _memory_checks(run: RunConfig, needs: estimate.Memory) -> list[dict]:
    usage, text = device.usage(), ""
    where = "GPU" if device.has_cuda() else "machine"
    if usage.total and needs.peak > usage.total * ROOM:
        text = f"This needs about {needs.peak / 1e9:.1f} GB; the {where} has {usage.total / 1e9:.1f} GB."
    elif usage.total and needs.peak > usage.free and runs.active() is None:
        text = f"This needs about {needs.peak / 1e9:.1f} GB; {usage.free / 1e9:.1f} GB are free now. Close other programs, or let it wait."
        return [check("warn", text)]
    if not text:
        return []
    changes = fitting(run)
    if not changes:
        return [check("warn", f"{text} Choose a smaller base or resolution.")]
    fits = estimate.memory(config.replace(run, changes), device.kind()).peak <= usage.total * ROOM
    return [
        check(
            "warn",
            text if fits else f"{text} Even so it may be too little.",
            "Fit to my device",
            changes=form.to_widgets(changes),
        )
    ]


def _tracking_checks(run: RunConfig) -> list[dict]:
    name = run.saving.tracking
    if name == "none" or find_spec(name):
        return []
    cure: dict[str, Any] = {"cure": "Do without", "changes": {"saving.tracking": "none"}}
    return [check("bad", f"The package {name} is not installed: pip install {name}.", **cure)]


def _device_checks(run: RunConfig, needs: estimate.Memory) -> list[dict]:
    return [*_count_checks(run), *_quantization_checks(run), *_memory_checks(run, needs)]


def _count_checks(run: RunConfig) -> list[dict]:
    """Without a GPU several processes may train; with GPUs each needs its own."""
    if run.training.devices <= device.count() or not device.has_cuda():
        return []
    text = f"The settings ask for {run.training.devices} GPUs; this machine has {device.count()}."
    return [
        check("bad", text, f"Use {device.count()}", changes={"training.devices": device.count()})
    ]


def _quantization_checks(run: RunConfig) -> list[dict]:
    how = run.base.quantization
    lacks = (
        "an NVIDIA GPU"
        if not device.has_cuda()
        else ""
        if find_spec("bitsandbytes")
        else "a package: pip install bitsandbytes"
    )
    if how == "none" or not lacks:
        return []
    text = f"Holding the base in {how.replace('bit', ' bits')} needs {lacks}."
    return [check("bad", text, "Keep the base whole", changes={"base.quantization": "none"})]


def _base_checks(run: RunConfig) -> list[dict]:
    if locate(run.base) is not None:
        return []
    small = {"cure": "Take the built-in base", "base": EMBEDDED}
    if os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "TRUE", "yes"):
        return [
            check(
                "bad",
                f"{run.base.model} is not on this machine, and downloads are switched off (HF_HUB_OFFLINE).",
                **small,
            )
        ]
    count = sum(estimate.size_of(run).parameters.values())
    need = count * 2
    if shutil.disk_usage(run_folder.outputs_folder()).free < need + SPARE_DISK:
        return [
            check(
                "bad",
                f"{run.base.model} has about {run_view.size(int(need))}, more than the disk has room for.",
                **small,
            )
        ]
    return [
        check("quiet", f"{run.base.model} is downloaded first, about {run_view.size(int(need))}.")
    ]


def _disk_checks(run: RunConfig) -> list[dict]:
    """Saves, two states (weight and two moments, float32) and some room for samples and the cache."""
    parameters = estimate.trainable_parameters(run) or 0
    need = (run.saving.saves + 1) * (estimate.file_bytes(run) or 0) + 2 * 12 * parameters + 50e6
    run_folder.outputs_folder().mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(run_folder.outputs_folder()).free
    if free > need + SPARE_DISK / 2:
        return []
    fewer: dict[str, Any] = (
        {"cure": "Keep one save", "changes": {"saving.saves": 1}} if run.saving.saves > 1 else {}
    )
    return [
        check(
            "bad",
            f"The run writes about {run_view.size(int(need))}, and the disk has {run_view.size(free)} left.",
            **fewer,
        )
    ]


def _picture_checks(
    run: RunConfig, items: list[scan.DatasetItem], findings: list, recipe: Preset | None
) -> list[dict]:
    found = []
    go = {"cure": "Go to Dataset", "go": "dataset"}
    if len(items) < FEW_IMAGES:
        few = f"Only {len(items)} picture{'' if len(items) == 1 else 's'}: ten or more varied ones give a far better result."
        found.append(check("warn", few, **go))
    bare = sum(not item.caption.strip() for item in items)
    if bare and not run.dataset.trigger:
        found.append(check("warn", f"{bare} of {len(items)} pictures have no caption.", **go))
    left_out = sum(finding.level == "error" for finding in findings)
    if left_out:
        found.append(
            check(
                "warn",
                f"{left_out} files cannot be used and are left out; the Dataset tab says why.",
                **go,
            )
        )
    small = [
        item for item in items if (item.width * item.height) ** 0.5 < run.dataset.resolution * SMALL
    ]
    if len(small) > len(items) / 2 and not run.dataset.allow_upscale:
        side = (
            sorted(int((item.width * item.height) ** 0.5) for item in items)[len(items) // 2]
            // 64
            * 64
        )
        if side >= max(64, run.dataset.bucket_step):
            text = f"{len(small)} of {len(items)} pictures are smaller than {run.dataset.resolution} pixels and are trained as they are."
            found.append(
                check("quiet", text, f"Train at {side}", changes={"dataset.resolution": side})
            )
    return found + _length_checks(run, items, recipe)


def _length_checks(run: RunConfig, items: list, recipe: Preset | None) -> list[dict]:
    """A recipe's views suit the numbers of pictures it names; far more pictures need each of them less often."""
    most = [int(number) for number in re.findall(r"\d+", recipe.pictures if recipe else "")][-1:]
    training = run.training
    if (
        recipe is None
        or not most
        or training.steps
        or len(items) <= 2 * most[0]
        or training.views_per_picture != recipe.config.training.views_per_picture
    ):
        return []
    enough = max(5, round(training.views_per_picture * most[0] / len(items)))
    text = f"{len(items)} pictures are many for this recipe: each may be seen less often."
    return [
        check("quiet", text, f"{enough} views each", changes={"training.views_per_picture": enough})
    ]

"""Compares everything that saves memory or time on a GPU with a training in float32.

    python -m benchmarks.cuda_check [--base FOLDER] [--steps 10] [--resolution 256]
        [--json report.json] [--only NAME ...]

Without --base the model is Stable Diffusion 1.5 in full size with random weights, built from its
public configuration. The table lists for each row: the distance of its losses and its finished
adapter from float32, the seconds per step, and the peak memory. If a row cannot run on this
machine, the table gives the reason. Exits with 1 if a distance is above its limit, or if a resumed
run differs from the uninterrupted one.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.full_size import PHOTOS, build
from trainer import config
from trainer.lora.formats.reader import read_adapter
from trainer.models.device import choose_device, device_name
from trainer.runs import events, run_folder, run_status
from trainer.training.runner import run_in

REFERENCE = "fp32"
RESUMED = "fp32, resumed"


@dataclass(frozen=True)
class Row:
    name: str
    changes: dict
    loss_limit: float
    """Largest relative difference from the loss of a step in float32."""
    adapter_limit: float = 1.0
    """Largest relative distance from the finished adapter in float32; 1 means nothing in common."""


ROWS = [
    Row(REFERENCE, {}, 0.0, 0.0),
    Row("without CUDA graphs", {"training.cuda_graphs": False}, 1e-3, 0.1),
    Row("fp16 with loss scaling", {"base.precision": "fp16"}, 0.02, 0.5),
    Row("bf16", {"base.precision": "bf16"}, 0.05, 0.7),
    Row("gradient checkpointing", {"training.gradient_checkpointing": True}, 1e-3, 0.1),
    Row("activation offload", {"training.activation_offload": True}, 1e-3, 0.1),
    Row(
        "checkpointing and offload",
        {"training.gradient_checkpointing": True, "training.activation_offload": True},
        1e-3,
        0.1,
    ),
    Row("8-bit AdamW", {"training.optimizer": "adamw8bit"}, 0.02, 0.5),
    Row("8-bit base", {"base.quantization": "8bit"}, 0.05, 0.9),
    Row("4-bit base", {"base.quantization": "4bit"}, 0.2, 0.95),
    Row("8-bit base in bf16", {"base.quantization": "8bit", "base.precision": "bf16"}, 0.05, 0.9),
    Row("4-bit base in bf16", {"base.quantization": "4bit", "base.precision": "bf16"}, 0.2, 0.95),
    Row(
        "4-bit base, PiSSA",
        {"base.quantization": "4bit", "adapter.init": "pissa"},
        0.2,
        float("inf"),
    ),
    Row(
        "DoRA on all layers, bf16",
        {"adapter.kind": "dora", "adapter.targets": "linear+conv", "base.precision": "bf16"},
        0.2,
        float("inf"),
    ),
    Row(
        "LoKr on all layers, bf16",
        {"adapter.kind": "lokr", "adapter.targets": "linear+conv", "base.precision": "bf16"},
        0.2,
        float("inf"),
    ),
]


def settings(base: str, steps: int, resolution: int) -> dict:
    return {
        "base.model": base,
        "base.precision": "fp32",
        "dataset.folder": str(PHOTOS),
        "dataset.resolution": resolution,
        "adapter.rank": 8,
        "adapter.alpha": 8.0,
        "training.steps": steps,
        "training.warmup": 0.0,
        "training.learning_rate": 1e-3,
        "training.text_encoder_learning_rate": 1e-4,
        "saving.saves": 1,
        "saving.state_every": max(1, steps // 2),
        "saving.precision": "fp32",
        "sampling.prompts": ["a photograph"],
        "sampling.inference_steps": 2,
    }


def measure(row: Row, common: dict) -> dict:
    """Trains one row. Returns its losses and folder, or the reason why it could not be trained."""
    report: dict = {"name": row.name, "reason": ""}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    folder = run_folder.create(
        config.replace(config.RunConfig(), common | {"name": row.name} | row.changes)
    )
    code, status = run_in(folder), run_status.read_status(folder)
    if code or status.finished is None:
        return report | {"reason": status.message or "the run did not finish"}
    warned = [w for w in status.warnings if "cannot be used" in w]
    if warned:
        return report | {"reason": warned[0]}
    seconds = [
        event.seconds
        for event in events.read_events(folder / "events.jsonl")
        if isinstance(event, events.StepDone)
    ]
    return report | {
        "losses": [loss for _, loss in status.losses],
        "validation": status.validation_losses[-1][1],
        "seconds_per_step": statistics.median(seconds[1:] or seconds),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30
        if torch.cuda.is_available()
        else None,
        "folder": str(folder),
        "file": status.finished.file,
    }


def resume(report: dict, steps: int) -> dict:
    """Resumes a copy of the reference run from its checkpoint in the middle."""
    source = Path(report["folder"])
    folder = Path(shutil.copytree(source, source.with_name(source.name + "-resumed")))
    shutil.rmtree(folder / "state" / f"{steps:06d}")
    code, status = run_in(folder), run_status.read_status(folder)
    if code or status.finished is None:
        return {"name": RESUMED, "reason": status.message or "the run did not finish"}
    return report | {
        "name": RESUMED,
        "losses": [loss for _, loss in status.losses],
        "folder": str(folder),
    }


def compare(report: dict, reference: dict) -> None:
    pairs = zip(report["losses"], reference["losses"], strict=True)
    report["loss_difference"] = max(abs(ours / theirs - 1) for ours, theirs in pairs)
    ours, theirs = (
        {(m.component, m.name): m for m in read_adapter(Path(r["folder"]) / r["file"]).modules}
        for r in (report, reference)
    )
    if ours.keys() == theirs.keys() and all(m.kind == "lora" for m in ours.values()):
        difference = sum(
            float((ours[key].delta - theirs[key].delta).square().sum()) for key in ours
        )
        size = sum(float(module.delta.square().sum()) for module in theirs.values())
        report["adapter_distance"] = (difference / size) ** 0.5


def show(report: dict, row: Row | None) -> bool:
    """Prints one line of the table. Returns whether the row is within its limits."""
    if report["reason"]:
        print(f"| {report['name']} | cannot run here: {report['reason']} | | | | |")
        return "bitsandbytes" in report["reason"] or "NVIDIA GPU" in report["reason"]
    # The resumed run has limits above zero because several threads add in any order.
    limits = (row.loss_limit, row.adapter_limit) if row else (1e-3, 0.1)
    distance = report.get("adapter_distance")
    good = report["loss_difference"] <= limits[0] and (distance is None or distance <= limits[1])
    memory = "" if report["peak_gib"] is None else f"{report['peak_gib']:.2f} GiB"
    columns = [
        f"{report['loss_difference']:.2%}",
        "" if distance is None else f"{distance:.2%}",
        f"{report['seconds_per_step']:.3f} s",
        memory,
        "good" if good else "OFF",
    ]
    print(f"| {report['name']} | {' | '.join(columns)} |", flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--base",
        default="",
        help="a model folder instead of Stable Diffusion 1.5 with random weights",
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--json", type=Path, help="write the whole report to this file")
    parser.add_argument(
        "--only",
        nargs="*",
        default=[],
        help="run only the reference and the rows whose names contain one of these",
    )
    options = parser.parse_args()
    device = choose_device()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["ATELIER_OUTPUTS"] = str(Path(temporary) / "outputs")
        base = options.base
        if not base:
            base = str(Path(temporary) / "sd15")
            build("sd15", Path(base), torch.float32, device.type)
        common = settings(base, options.steps, options.resolution)
        print(
            f"torch {torch.__version__} on {device_name(device)}; "
            f"{options.steps} steps at {options.resolution} px\n"
        )
        print("| run | loss | adapter | step | memory | |\n|---|--:|--:|--:|--:|---|")
        wanted = [
            row
            for row in ROWS
            if row.name == REFERENCE
            or not options.only
            or any(part in row.name for part in options.only)
        ]
        reports, good = [], True
        for row in wanted:
            report = measure(row, common)
            reports.append(report)
            if row.name == REFERENCE and report["reason"]:
                print(f"The reference could not be trained: {report['reason']}")
                return 1
            if not report["reason"]:
                compare(report, reports[0])
            good &= show(report, row)
            if row.name == REFERENCE:
                again = resume(report, options.steps)
                if not again["reason"]:
                    compare(again, report)
                good &= show(again, None)
                reports.insert(1, again)
        if options.json:
            rows = {row.name: asdict(row) for row in wanted}
            document = {
                "torch": torch.__version__,
                "device": device_name(device),
                "rows": rows,
                "reports": reports,
            }
            options.json.write_text(json.dumps(document, indent=1), encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

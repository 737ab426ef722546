"""Estimates the peak memory of each preset and the graphics cards it fits, and measures it on CUDA.

    python -m benchmarks.memory [PRESET ...] [--set KEY=VALUE] [--no-measure] [--json FILE]

On CUDA a separate process trains each preset for two steps, on its base in full size with random
weights. The table compares the peak of the memory that torch allocated with the estimate of the
page. Without CUDA the table has only estimates.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.full_size import PHOTOS, build
from trainer import config
from trainer.config import EMBEDDED, RunConfig, presets
from trainer.models.device import device_name
from trainer.models.model_files import locate
from trainer.runs import run_folder
from trainer.training import estimate
from trainer.training.runner import run_in

CARDS = (4, 6, 8, 12, 16, 24, 48, 80)  # gigabytes
ROOM = 0.94  # fraction of a card; the system uses the rest
MODEL_OF_NAME = {"v1-5": "sd15", "xl-base": "sdxl", "3.5-medium": "sd35m", "2-1": "sd21"}
"""A part of a base's name -> its model in `full_size.MODELS`."""


def model_of(run: RunConfig) -> str:
    return next(model for part, model in MODEL_OF_NAME.items() if part in run.base.model)


def measured(name: str, options: argparse.Namespace) -> float | None:
    """Returns the peak in bytes, measured in a new process, or None if the training failed."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.memory",
        name,
        "--measure-here",
        *(f"--set={setting}" for setting in options.settings),
    ]
    ended = subprocess.run(command, capture_output=True, text=True)
    peak = re.search(r"^peak (\d+)$", ended.stdout, re.MULTILINE)
    if not peak:
        print(
            f"{name} could not be measured:\n{ended.stdout[-500:]}{ended.stderr[-500:]}",
            file=sys.stderr,
        )
    return float(peak[1]) if peak else None


def measure_here(run: RunConfig) -> float:
    """Trains two steps in this process. Raises SystemExit if the training fails."""
    with tempfile.TemporaryDirectory() as outputs:
        os.environ["ATELIER_OUTPUTS"] = outputs
        changes: dict[str, Any] = {
            "dataset.folder": str(PHOTOS),
            "training.steps": 2,
            "training.warmup": 0.0,
            "saving.saves": 1,
        }
        changes |= {
            "sampling.inference_steps": 2,
            "sampling.prompts": ["a photograph"],
            "name": "memory",
        }
        if run.base.model != EMBEDDED:
            build(model_of(run), Path(outputs, "base"), torch.float16, "cuda")
            changes |= {"base.model": str(Path(outputs, "base")), "base.t5": False}
            torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        if run_in(run_folder.create(config.replace(run, changes))):
            raise SystemExit(1)
        return torch.cuda.max_memory_allocated()


def row(name: str, options: argparse.Namespace, on_cuda: bool) -> dict[str, Any]:
    run = read(name, options)
    needs = estimate.memory(run, "cuda")
    smallest = next((card for card in CARDS if needs.peak <= card * 1e9 * ROOM), None)
    fitted = {
        card: estimate.memory(
            config.replace(run, estimate.fit(run, "cuda", card * 1e9 * ROOM)), "cuda"
        ).peak
        for card in CARDS
    }
    return {
        "preset": name,
        "from_header": run.base.model == EMBEDDED or locate(run.base) is not None,
        "estimated": {
            phase: getattr(needs, phase) for phase in ("load", "cache", "step", "sample")
        },
        "estimated_cpu": estimate.memory(run, "cpu").peak,
        "card": smallest,
        "card_fitted": next(
            (card for card, peak in fitted.items() if peak <= card * 1e9 * ROOM), None
        ),
        "measured": measured(name, options) if on_cuda else None,
    }


def read(name: str, options: argparse.Namespace) -> RunConfig:
    return config.replace(
        presets.load_preset(name).config,
        dict(config.parse_setting(text) for text in options.settings),
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("presets", nargs="*", metavar="PRESET", help="default: all presets")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--no-measure", action="store_true", help="print only the estimates")
    parser.add_argument("--measure-here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    if options.measure_here:
        print(f"peak {measure_here(read(options.presets[0], options)):.0f}")
        return 0
    on_cuda = torch.cuda.is_available() and not options.no_measure
    rows = [row(name, options, on_cuda) for name in options.presets or presets.load_presets()]
    print(
        f"Measured on {device_name(torch.device('cuda'))}."
        if on_cuda
        else "Estimates only: nothing was measured, because there is no CUDA device."
    )
    print(
        "Gigabytes on a GPU. The estimates include 0.7 for the context of the device, which the "
        "measured peak of torch does not.\n"
    )
    print(
        "| preset | loading | caching | training | samples | smallest card "
        "| with Fit to my device | on a CPU | measured peak |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for each in rows:
        phases = " | ".join(f"{value / 1e9:.1f}" for value in each["estimated"].values())
        peak = "" if each["measured"] is None else f"{each['measured'] / 1e9:.1f}"
        print(
            f"| {each['preset']} | {phases} | {each['card'] or 'none'} GB "
            f"| {each['card_fitted'] or 'none'} GB | {each['estimated_cpu'] / 1e9:.1f} | {peak} |"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

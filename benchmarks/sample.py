"""Measures the seconds per sample of a base alone and with an adapter.

    python -m benchmarks.sample [embedded | sd15 | sdxl | sd35m] [--steps 20] [--size 512]
        [--adapter FILE] [--repeats 3] [--json FILE]

The first sample includes loading the base. The embedded base is the real one; the others have their
full size and random weights. Without `--adapter` the adapter has rank 16 on every attention
projection. On a CPU seconds are processor seconds of one thread, on CUDA wall-clock seconds.
"""

import argparse
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.full_size import build
from benchmarks.measuring import device_to_measure, keep, timed
from trainer import config
from trainer.config import EMBEDDED
from trainer.families import load_base
from trainer.families.base import denoiser_of
from trainer.inference.samples import Sampler, SampleRequest, StackedAdapter, sampler_name
from trainer.lora import inject, writer
from trainer.models.device import DTYPES, device_name
from trainer.models.libraries import configure_libraries
from trainer.training import oom_fallbacks


def make_adapter(base: config.Base, file: Path) -> None:
    """Saves an adapter of rank 16 with small random weights in both matrices."""
    loaded = load_base(base, torch.float32)
    name = loaded.family.denoiser_name
    inject.inject(loaded.denoiser, name, config.Adapter(init="gaussian"), 1)
    draws = torch.Generator().manual_seed(1)
    for parameter in inject.trainable(loaded.denoiser).values():
        parameter.data = 0.01 * torch.randn(parameter.shape, generator=draws)
    modules = list(inject.adapted_modules({name: loaded.denoiser}))
    writer.save_adapter(
        file, loaded.family.default_format, modules, loaded.family, torch.float16, {}
    )
    oom_fallbacks.release_memory()


def measure(options: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    if options.model == EMBEDDED:
        base = config.Base()
    else:
        build(
            options.model,
            folder / options.model,
            torch.float16 if device.type == "cuda" else torch.float32,
            device.type,
        )
        base = config.Base(model=str(folder / options.model), t5=False)
    if not options.adapter:
        options.adapter = folder / "adapter.safetensors"
        make_adapter(base, options.adapter)
    plain = SampleRequest(
        prompt="a photograph of a red house",
        target=str(folder / "sample.png"),
        base=base,
        inference_steps=options.steps,
        width=options.size,
        height=options.size,
    )
    adapted = replace(plain, adapters=[StackedAdapter(str(options.adapter))])
    sampler = Sampler()
    first = timed(lambda: sampler.render(plain), device)
    alone = statistics.median(
        timed(lambda: sampler.render(plain), device) for _ in range(options.repeats)
    )
    first_adapted = timed(lambda: sampler.render(adapted), device)
    with_adapter = statistics.median(
        timed(lambda: sampler.render(adapted), device) for _ in range(options.repeats)
    )
    pipe = load_base(base, DTYPES["fp32"]).pipe if not options.size else None
    return {
        "device": device_name(device),
        "model": options.model,
        "size": options.size or denoiser_of(pipe).config.sample_size * pipe.vae_scale_factor,
        "steps": options.steps,
        "sampler": sampler_name(sampler._loaded.pipe) if sampler._loaded else "",
        "first_seconds": first,
        "seconds": alone,
        "first_with_adapter_seconds": first_adapted,
        "with_adapter_seconds": with_adapter,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", nargs="?", default=EMBEDDED, choices=(EMBEDDED, "sd15", "sdxl", "sd35m")
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--size", type=int, default=0, help="pixels (default: the native size of the base)"
    )
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="append the row to this file")
    options = parser.parse_args()
    configure_libraries()
    device = device_to_measure()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(options, device, Path(folder))
    print(
        "| base, pixels, steps, sampler | device | first, with loading | next "
        "| first with an adapter | next with it |"
    )
    print("|---|---|--:|--:|--:|--:|")
    seconds = ("first_seconds", "seconds", "first_with_adapter_seconds", "with_adapter_seconds")
    times = " | ".join(f"{row[name]:.2f} s" for name in seconds)
    print(
        f"| {row['model']}, {row['size']}, {row['steps']}, {row['sampler']} "
        f"| {row['device']} | {times} |"
    )
    keep(row, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

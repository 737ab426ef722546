"""Trains a few steps on a full-size model with random weights, and prints sizes and seconds.

    python -m benchmarks.full_size [sd15 | sdxl | sd35m | ...] [--steps 3] [--resolution 256]
        [--dtype bf16] [--device cuda] [--set KEY=VALUE ...]

The model is built from its public configuration and saved as a diffusers folder (2 GB for Stable
Diffusion 1.5, 7 GB for XL and for 3.5 Medium). The ordinary command then trains it on the example
photographs. Sizes, seconds and memory are real, but the samples are noise. Stable Diffusion 3 is
built without T5, because its vocabulary is not part of the program.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import torch
import transformers
from torch import nn

from trainer.families.from_single_file import clip_tokenizer
from trainer.models.device import DTYPES
from trainer.models.model_files import EMBEDDED_FOLDER
from trainer.models.pipelines import T5_PARTS
from trainer.models.single_file import CONFIGS_FOLDER, template_config
from trainer.runs import run_folder, run_status
from trainer.training import estimate

PHOTOS = EMBEDDED_FOLDER.parent / "examples" / "photos"
MODELS = sorted(path.parent.name for path in CONFIGS_FOLDER.glob("*/model_index.json"))
# Presets of the models; the others use the preset of 3.5 Medium.
PRESETS = {
    "sd15": "sd15-subject",
    "sd21": "sd21-subject",
    "sd21-base": "sd21-subject",
    "sdxl": "sdxl-subject",
}


def build(model: str, folder: Path, dtype: torch.dtype, device: str) -> None:
    """Writes a model folder with random weights, with one part in memory at a time.

    On the device "meta" it writes no weights.
    """
    index = template_config(model, "model_index.json")
    index |= {part: [None, None] for part in T5_PARTS if part in index}
    for part, entry in index.items():
        if part == "scheduler":
            getattr(diffusers, entry[1]).from_config(
                template_config(model, "scheduler/scheduler_config.json")
            ).save_pretrained(folder / part)
        elif part.startswith("tokenizer") and entry[0]:
            clip_tokenizer().save_pretrained(folder / part)
        elif isinstance(entry, list) and entry[0]:
            module = build_part(model, part, entry, dtype, device)
            if device != "meta":
                module.save_pretrained(folder / part, max_shard_size="50GB")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def build_part(
    model: str, part: str, entry: list[str], dtype: torch.dtype, device: str
) -> nn.Module:
    """Returns a part with random weights. A GPU makes them in seconds, a CPU in minutes."""
    settings = template_config(model, f"{part}/config.json")
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            if entry[0] == "diffusers":
                return getattr(diffusers, entry[1]).from_config(settings)
            kind = getattr(transformers, entry[1])
            return kind(kind.config_class.from_dict(settings))
    finally:
        torch.set_default_dtype(torch.float32)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="sd15", choices=MODELS)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp16", help="number format of the saved weights"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch found no CUDA device")
    with tempfile.TemporaryDirectory() as temporary:
        started, base = time.monotonic(), Path(temporary) / options.model
        build(options.model, base, DTYPES[options.dtype], options.device)
        print(f"built in {time.monotonic() - started:.0f} s", flush=True)
        settings = [
            f"base.model={base}",
            f"training.steps={options.steps}",
            f"dataset.resolution={options.resolution}",
            "training.batch_size=1",
            "saving.saves=1",
            "sampling.inference_steps=2",
            'sampling.prompts=["a photograph"]',
            *options.settings,
        ]
        preset = PRESETS.get(options.model, "sd35m-subject")
        command = [
            sys.executable,
            "-m",
            "trainer",
            "train",
            preset,
            "--dataset",
            str(PHOTOS),
            "--name",
            "full-size",
        ]
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {})
        code = subprocess.run(
            command + [part for setting in settings for part in ("--set", setting)], env=environment
        ).returncode
        folder = run_folder.list_runs()[0]
        status = run_status.read_status(folder)
        if code or not status.started:
            return 1
        print(
            json.dumps(
                {
                    "model": options.model,
                    "device": status.started.device,
                    "precision": status.started.precision,
                    "trainable_parameters": status.started.trainable_parameters,
                    "seconds_per_step": round(status.seconds_per_step or 0, 2),
                    "file_bytes": (folder / status.finished.file).stat().st_size,
                    "estimated_file_bytes": status.started.trainable_parameters
                    * estimate.FILE_BYTES["fp16"],
                },
                indent=1,
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

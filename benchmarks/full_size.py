"""Trains a few steps on a full-size Stable Diffusion 1.5 with random weights: does everything fit, and how long does it take?

    python benchmarks/full_size.py [--steps 3] [--resolution 256] [--set KEY=VALUE ...]

The model is built from the public configuration and saved as a diffusers folder (2 GB), then trained through the
ordinary command on the example photographs. The result is no picture, but sizes, seconds and memory are real.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from trainer import estimate, run_folder
from trainer.base_model import EMBEDDED_FOLDER

PHOTOS = EMBEDDED_FOLDER.parent / "examples" / "photos"


def build(folder: Path) -> None:
    """Stable Diffusion 1.5's own sizes; the tokenizer is that of the embedded base, whose words are fewer."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, cross_attention_dim=768, attention_head_dim=8
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(EMBEDDED_FOLDER / "tokenizer"),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        started = time.monotonic()
        build(Path(temporary) / "sd15")
        print(f"built in {time.monotonic() - started:.0f} s", flush=True)
        settings = [
            f"base.model={temporary}/sd15",
            f"training.steps={options.steps}",
            f"dataset.resolution={options.resolution}",
            "training.batch_size=1",
            "saving.saves=1",
            "sampling.inference_steps=2",
            'sampling.prompts=["a photograph"]',
            *options.settings,
        ]
        command = [sys.executable, "-m", "trainer", "train", "sd15-subject", "--dataset", str(PHOTOS), "--name", "full-size"]
        code = subprocess.run(command + [part for setting in settings for part in ("--set", setting)]).returncode
        folder = run_folder.list_runs()[0]
        status = run_folder.status(folder)
        if code or not status.started:
            return 1
        print(
            json.dumps(
                {
                    "device": status.started.device,
                    "precision": status.started.precision,
                    "trainable_parameters": status.started.trainable_parameters,
                    "seconds_per_step": round(status.seconds_per_step or 0, 2),
                    "file_bytes": (folder / status.finished.file).stat().st_size,
                    "estimated_file_bytes": status.started.trainable_parameters * estimate.FILE_BYTES["fp16"],
                },
                indent=1,
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

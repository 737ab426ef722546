"""Pictures a second into the cache, and out of it again: the full-size VAE with random weights, the functions that a run uses.

    python -m benchmarks.cache [sd15 | sdxl | sd35m] [--resolution 512] [--pictures 8] [--dtype fp32] [--json FILE]

Pictures are generated photographs-to-be of 1.5 times the size. On a CPU seconds are processor seconds of one thread, since other programs
may run beside; on CUDA, wall-clock seconds.
"""

import argparse
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from benchmarks.measuring import device_to_measure, keep, timed
from trainer.data import latent_cache
from trainer.data.augment import Look
from trainer.data.buckets import Crop
from trainer.models.device import DTYPES, device_name
from trainer.models.libraries import configure_libraries
from trainer.models.single_file import template_config
from trainer.runs import cache_limits


def build_vae(model: str, device: torch.device, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return (
        diffusers.AutoencoderKL.from_config(template_config(model, "vae/config.json"))
        .to(device, dtype)
        .eval()
        .requires_grad_(False)
    )


def make_pictures(folder: Path, count: int, resolution: int) -> list[Path]:
    """JPEGs of coloured clouds with grain, 3 : 2 before the square cut."""
    paths, width, height = [], resolution * 3 // 2, resolution
    for seed in range(count):
        random = np.random.default_rng(seed)
        clouds = Image.fromarray(random.integers(0, 255, (6, 9, 3), dtype=np.uint8)).resize(
            (width * 3 // 2, height * 3 // 2)
        )
        grain = random.integers(-12, 12, (clouds.height, clouds.width, 1))
        paths.append(folder / f"{seed:04}.jpg")
        Image.fromarray(
            np.clip(np.asarray(clouds, dtype=np.int16) + grain, 0, 255).astype(np.uint8)
        ).save(paths[-1], quality=90)
    return paths


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    vae, side = build_vae(options.model, device, DTYPES[options.dtype]), options.resolution
    pictures = make_pictures(Path(os.environ["ATELIER_OUTPUTS"]), options.pictures, side)
    look = Look(
        Crop(bucket=(side, side), scaled=(side * 3 // 2, side), left=side // 4, top=0), False
    )
    keys = [
        latent_cache.latents_key(latent_cache.file_hash(path), look.facts, options.model)
        for path in pictures
    ]

    def go_through() -> None:
        for path, key in zip(pictures, keys, strict=True):
            latent_cache.cached(
                key,
                lambda path=path: latent_cache.encode_image(
                    vae, latent_cache.to_pixels(path, look)
                ),
            )

    pixels = timed(partial(latent_cache.to_pixels, pictures[0], look), device)
    latent_cache.encode_image(
        vae, latent_cache.to_pixels(pictures[0], look)
    )  # the first one finds the kernels
    encoding, size = timed(go_through, device), cache_limits.size()
    reading = timed(go_through, device)
    return {
        "device": device_name(device),
        "model": options.model,
        "resolution": side,
        "dtype": options.dtype,
        "pictures": options.pictures,
        "opened_cut_scaled_seconds": pixels,
        "encoded_per_second": options.pictures / encoding,
        "read_per_second": options.pictures / reading,
        "bytes_per_picture": size // options.pictures,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="sd15", choices=("sd15", "sdxl", "sd35m"))
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="the VAE is float32 in a run"
    )
    parser.add_argument("--json", type=Path, help="append the row to this file")
    options = parser.parse_args()
    configure_libraries()
    device = device_to_measure()
    with tempfile.TemporaryDirectory() as place:
        os.environ["ATELIER_OUTPUTS"] = place
        row = measure(options, device)
    print(
        "| VAE, pixels | device | encoded a second | read again a second | opening, cutting, scaling one | bytes each |"
    )
    print("|---|---|--:|--:|--:|--:|")
    print(
        f"| {row['model']}, {row['resolution']}, {row['dtype']} | {row['device']} | {row['encoded_per_second']:.2f} "
        f"| {row['read_per_second']:.0f} | {row['opened_cut_scaled_seconds'] * 1e3:.0f} ms | {row['bytes_per_picture']:,} |"
    )
    keep(row, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

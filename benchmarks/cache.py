"""Measures images per second into the latent cache, and out of it again.

    python -m benchmarks.cache [sd15 | sdxl | sd35m] [--resolution 512] [--pictures 8]
        [--dtype fp32] [--json FILE]

The VAE has its full size and random weights. It runs through the functions that a training uses.
The images are generated, at 1.5 times the resolution. On a CPU seconds are processor seconds of one
thread, because other programs may run at the same time; on CUDA they are wall-clock seconds.
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
from trainer.data.augment import ImageView
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


def make_images(folder: Path, count: int, resolution: int) -> list[Path]:
    """Writes JPEGs of coloured clouds with grain, 3 : 2 before the square crop."""
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
    vae = build_vae(options.model, device, DTYPES[options.dtype])
    side = options.resolution
    images = make_images(Path(os.environ["ATELIER_OUTPUTS"]), options.pictures, side)
    view = ImageView(
        Crop(bucket=(side, side), scaled=(side * 3 // 2, side), left=side // 4, top=0), False
    )
    keys = [
        latent_cache.latents_key(latent_cache.file_hash(path), view.cache_key, options.model)
        for path in images
    ]

    def read_all() -> None:
        for path, key in zip(images, keys, strict=True):
            latent_cache.cached(
                key,
                lambda path=path: latent_cache.encode_image(
                    vae, latent_cache.to_pixels(path, view)
                ),
            )

    pixels = timed(partial(latent_cache.to_pixels, images[0], view), device)
    # The first image also selects the kernels.
    latent_cache.encode_image(vae, latent_cache.to_pixels(images[0], view))
    encoding = timed(read_all, device)
    size = cache_limits.size()
    reading = timed(read_all, device)
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
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ATELIER_OUTPUTS"] = folder
        row = measure(options, device)
    print(
        "| VAE, pixels | device | encoded per second | read again per second "
        "| open, crop and scale one | bytes per image |"
    )
    print("|---|---|--:|--:|--:|--:|")
    print(
        f"| {row['model']}, {row['resolution']}, {row['dtype']} | {row['device']} "
        f"| {row['encoded_per_second']:.2f} | {row['read_per_second']:.0f} "
        f"| {row['opened_cut_scaled_seconds'] * 1e3:.0f} ms | {row['bytes_per_picture']:,} |"
    )
    keep(row, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

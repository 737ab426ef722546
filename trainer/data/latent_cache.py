"""Latents and conditioning on disk, addressed by what they were computed from.

A key contains everything that the entry depends on, so a stale entry is never found. Deleting the
cache only costs time. A damaged entry counts as missing.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from trainer.data.augment import ImageView, apply_view
from trainer.data.images import open_image
from trainer.runs.atomic_files import atomic_write
from trainer.runs.cache_limits import cache_folder, touch

VERSION = 1  # part of every key: raise it when entries are computed differently


# Keys


def file_hash(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def legacy_model_hash(path: Path) -> str:
    """Returns the eight digits by which A1111 and sd-scripts name a model.

    They depend only on 64 KiB after the first mebibyte.
    """
    with open(path, "rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def latents_key(image_sha256: str, view_key: dict[str, Any], vae_hash: str) -> str:
    """Returns the key of the latents of one view (`ImageView.cache_key`) of an image."""
    return _key("latents", image_sha256, view_key, vae_hash)


def mask_key(kind: str, sha256: str, view_key: dict[str, Any]) -> str:
    """Returns the key of a mask; `sha256` is the mask file's, or the image's for its alpha."""
    return _key(kind, sha256, view_key)


def conditioning_key(caption: str, encoder_hash: str) -> str:
    """Returns the key of the conditioning of a caption."""
    return _key("conditioning", caption, encoder_hash)


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([VERSION, *parts], sort_keys=True).encode()).hexdigest()


# Entries


def cached(key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the entry of a key, on the CPU. Computes and stores it if it is missing."""
    path = cache_folder() / key[:2] / f"{key}.safetensors"
    try:
        entry = load_tensors(path.read_bytes())
        touch(path)
        return entry
    except (FileNotFoundError, SafetensorError):
        entry = {name: tensor.contiguous().cpu() for name, tensor in make().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, save_tensors(entry))
    return entry


def to_pixels(path: Path, view: ImageView) -> Tensor:
    """Returns the image as the VAE sees it: [1, 3, H, W] float32 in -1..1."""
    image, _ = open_image(path)
    array = np.asarray(apply_view(image, view), dtype=np.float32)
    return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1).unsqueeze(0)


def to_mask(image: Image.Image, view: ImageView, size: tuple[int, int]) -> Tensor:
    """Returns how white a grey mask is under each latent: [1, h, w] in 0..1, for `size` (h, w).

    The mask may have another size than its image, but the same shape. Colour changes of the view
    do not apply to it.
    """
    seen = apply_view(image, ImageView(view.crop, view.mirrored))
    height, width = size
    array = np.asarray(seen.resize((width, height), Image.Resampling.BOX), dtype=np.float32)
    return torch.from_numpy(array / 255).unsqueeze(0)


def encode_image(vae: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Returns the "mean" and "std" of the latents, [C, h, w] each, unscaled, in float32.

    Each training step draws its latents from them.
    """
    with torch.no_grad():
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return {"mean": posterior.mean[0].float(), "std": posterior.std[0].float()}

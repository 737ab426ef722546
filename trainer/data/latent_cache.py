"""Latents and conditioning on disk, addressed by what they were made from.

The key holds everything the content depends on, so a stale entry cannot be found, and deleting the
cache costs time only. A damaged entry is a miss.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from trainer.data.augment import Look, apply_look
from trainer.data.images import open_image
from trainer.runs.atomic_files import atomic_write
from trainer.runs.cache_limits import cache_folder, touch

VERSION = 1  # part of every key: raise it when the making of an entry changes


def file_hash(path: Path) -> str:
    """Sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def legacy_model_hash(path: Path) -> str:
    """The eight digits by which A1111 and sd-scripts name a model: of 64 KiB at the first mebibyte only."""
    with open(path, "rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def latents_key(picture_sha256: str, look: dict[str, Any], vae_hash: str) -> str:
    return _key("latents", picture_sha256, look, vae_hash)


def mask_key(kind: str, sha256: str, look: dict[str, Any]) -> str:
    return _key(kind, sha256, look)


def conditioning_key(caption: str, encoder_hash: str) -> str:
    return _key("conditioning", caption, encoder_hash)


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([VERSION, *parts], sort_keys=True).encode()).hexdigest()


def cached(key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The entry under a key, made and stored when it is not there or cannot be read."""
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


def to_pixels(path: Path, look: Look) -> Tensor:
    """The picture as the VAE sees it: [1, 3, H, W] in -1..1, float32."""
    image, _ = open_image(path)
    array = np.asarray(apply_look(image, look), dtype=np.float32)
    return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1).unsqueeze(0)


@torch.no_grad()
def encode_image(vae: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Mean and standard deviation of the latents, [C, h, w] each, unscaled; each step draws from them."""
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    return {"mean": posterior.mean[0].float(), "std": posterior.std[0].float()}

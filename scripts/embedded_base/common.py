"""Shared by the stages: training images, the learning rate schedule, and files."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from trainer.embedded import world
from trainer.embedded.score import HERE

SEED = 20261122
POOL_SEED = 1_000_000
"""First seed of the training images. The prompts of the scorer and the classifier use others."""


def draw_pool(count: int, first_seed: int) -> tuple[np.ndarray, list[str], list[world.Scene]]:
    """Returns images as uint8 [count, 64, 64, 3], their captions, and their scenes."""
    examples = [world.draw_example(seed) for seed in range(first_seed, first_seed + count)]
    pixels = np.stack([np.asarray(image) for image, _, _ in examples])
    return pixels, [caption for _, caption, _ in examples], [scene for _, _, scene in examples]


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, h, w, 3] -> float32 [B, 3, h, w] in -1 .. 1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def cosine(step: int, steps: int, warmup: int = 100) -> float:
    return min(1.0, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps)))


def save_atomically(state: dict, path: Path) -> None:
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def save_half(model, folder: Path) -> None:
    """Saves a float16 copy, so that the float32 model can train on."""
    copy.deepcopy(model).half().save_pretrained(folder)


def draw_confetti(rng: np.random.Generator) -> np.ndarray:
    """Draws random shapes and colours, so that the VAE learns more than the world contains."""
    side = world.PIXELS * 2
    image = Image.new("RGB", (side, side), tuple(rng.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(1, 7)):
        colour = tuple(rng.integers(0, 256, 3).tolist())
        x, y = rng.uniform(0, side, 2)
        w, h = rng.uniform(side / 12, side / 2, 2)
        kind = rng.integers(3)
        if kind == 0:
            draw.ellipse((x - w / 2, y - h / 2, x + w / 2, y + h / 2), fill=colour)
        elif kind == 1:
            draw.polygon(
                [(x + rng.normal() * w / 2, y + rng.normal() * h / 2) for _ in range(4)],
                fill=colour,
            )
        else:
            draw.line(
                [(x, y), tuple(rng.uniform(0, side, 2))],
                fill=colour,
                width=int(rng.integers(2, 12)),
            )
    return np.asarray(image.resize((world.PIXELS,) * 2, Image.Resampling.BOX))


def photo_crops(count: int, rng: np.random.Generator) -> np.ndarray:
    """Returns random crops of the example photographs, so that the VAE learns real images too."""
    photos = [
        Image.open(path).convert("RGB") for path in sorted((HERE / "examples/photos").glob("*.jpg"))
    ]
    crops = []
    for i in range(count):
        photo = photos[i % len(photos)]
        size = int(rng.uniform(96, min(photo.size)))
        x, y = (int(rng.integers(0, edge - size + 1)) for edge in photo.size)
        crop = photo.resize(
            (world.PIXELS,) * 2, Image.Resampling.BOX, box=(x, y, x + size, y + size)
        )
        crops.append(np.asarray(crop)[:, :: rng.choice((-1, 1))])
    return np.stack(crops)

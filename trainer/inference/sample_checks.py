"""What the samples of a save give away: whether the subject leaks into prompts without its trigger, and whether pictures are copied.

Both compare at low frequencies only, colour and layout: light, the same for every family, and blind to fine likeness such as a face.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SIDE = 32  # pixels that a leak is looked for in
GRID = 8  # places a side that a likeness is looked for in
MOST = 2000  # training pictures that samples are compared with


def change(before: Image.Image, after: Image.Image) -> float:
    """Mean difference of two pictures at a low resolution, 0..1."""
    small = [
        np.asarray(
            image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32
        )
        / 255
        for image in (before, after)
    ]
    return float(np.abs(small[0] - small[1]).mean())


def leak(
    with_trigger: tuple[Image.Image, Image.Image], without: tuple[Image.Image, Image.Image]
) -> float | None:
    """How much of the change that the adapter makes (base, adapted) with the trigger it makes without it too, with the same seed.

    0: none, 1: as much. None where it changes nothing with the trigger either.
    """
    wanted = change(*with_trigger)
    return change(*without) / wanted if wanted > 1 / 255 else None


@torch.no_grad()
def latents_of(pipe, images: Sequence[Image.Image]) -> list[Tensor]:
    """Mean latents [C, h, w] of pictures, by the VAE of a pipeline on its device."""
    pixels = [
        pipe.image_processor.preprocess(image.convert("RGB")).to(pipe.vae.device, pipe.vae.dtype)
        for image in images
    ]
    return [pipe.vae.encode(each).latent_dist.mode()[0].cpu() for each in pixels]


def likeness(samples: Sequence[Tensor], pictures: Sequence[Tensor]) -> tuple[float, float] | None:
    """Mean cosine of each sample to its nearest training picture, and the median of each picture to its nearest other one: a sample much
    nearer than that is a copy. Of mean latents [C, h, w] of any size, without what all pictures share; None with fewer than two pictures.
    """
    if len(pictures) < 2 or not samples:
        return None
    own = torch.stack([_rough(latents) for latents in pictures[:MOST]])
    shared = own.mean(0)
    own = torch.nn.functional.normalize(own - shared, dim=1)
    drawn = torch.nn.functional.normalize(
        torch.stack([_rough(latents) for latents in samples]) - shared, dim=1
    )
    between = (own @ own.T).fill_diagonal_(-1.0).amax(1).median()
    return float((drawn @ own.T).amax(1).mean()), float(between)


def _rough(latents: Tensor) -> Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(latents.float(), GRID).flatten()

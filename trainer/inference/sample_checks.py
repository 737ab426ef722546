"""What samples reveal about an adapter: a leaking trigger, and copies of training images.

Both checks compare images at low resolution, thus colours and layout. They are cheap and work for
every family, but they do not see fine likeness such as a face.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

LEAK_SIDE = 32
"""Side of the images that the leak check compares, in pixels."""
LIKENESS_SIDE = 8
"""Side of the latents that the likeness check compares."""
MAX_IMAGES = 2000
"""Training images that samples are compared with."""
MIN_CHANGE = 1 / 255
"""A smaller mean difference of two images is not visible."""


def mean_difference(before: Image.Image, after: Image.Image) -> float:
    """Returns the mean difference of two images at low resolution, 0 to 1."""
    return float(np.abs(_small(before) - _small(after)).mean())


def _small(image: Image.Image) -> np.ndarray[Any, Any]:
    size = LEAK_SIDE, LEAK_SIDE
    small = image.convert("RGB").resize(size, Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255


def leak(
    with_trigger: tuple[Image.Image, Image.Image], without: tuple[Image.Image, Image.Image]
) -> float | None:
    """Returns how much the adapter changes an image whose prompt lacks the trigger.

    Each pair is an image of the base and one of the adapter, from the same seed. The result is
    relative to the change with the trigger: 0 means no change, 1 the same change. It is None if the
    adapter changes nothing with the trigger.
    """
    expected = mean_difference(*with_trigger)
    return mean_difference(*without) / expected if expected > MIN_CHANGE else None


def latents_of(pipe: Any, images: Sequence[Image.Image]) -> list[Tensor]:
    """Returns the mean latents [C, h, w] of images on the CPU. The VAE is not moved."""
    vae, latents = pipe.vae, []
    with torch.no_grad():
        for image in images:
            pixels = pipe.image_processor.preprocess(image.convert("RGB"))
            encoded = vae.encode(pixels.to(vae.device, vae.dtype))
            latents.append(encoded.latent_dist.mode()[0].cpu())
    return latents


def likeness(samples: Sequence[Tensor], images: Sequence[Tensor]) -> tuple[float, float] | None:
    """Returns the similarity of samples to the training images, and of these to each other.

    Both are cosines of mean latents [C, h, w] of any size, after subtracting the mean of the
    training images. The first is the mean over the samples, each with its nearest training image.
    The second is the median over the training images, each with its nearest other one. If the
    first is much larger, the samples are copies. Returns None for fewer than two training images
    or no samples.
    """
    if len(images) < 2 or not samples:
        return None
    own = torch.stack([_low_frequencies(latents) for latents in images[:MAX_IMAGES]])
    mean = own.mean(0)
    own = normalize(own - mean, dim=1)
    generated = torch.stack([_low_frequencies(latents) for latents in samples])
    generated = normalize(generated - mean, dim=1)
    between = (own @ own.T).fill_diagonal_(-1.0).amax(1).median()
    return float((generated @ own.T).amax(1).mean()), float(between)


def _low_frequencies(latents: Tensor) -> Tensor:
    return adaptive_avg_pool2d(latents.float(), LIKENESS_SIDE).flatten()

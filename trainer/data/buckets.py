"""Crops: the size each image is trained at and the part of it that is seen.

No image is left out: each gets a crop. No image is enlarged unless the settings allow it, except
that a side shorter than one step becomes one step. The centre of a crop can be moved by hand; it
is saved in the dataset.
"""

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from trainer.data.dataset_files import OWN_FOLDER
from trainer.errors import DatasetError

MAX_ASPECT = 2.0  # the default of `dataset.max_aspect`
MIN_USED_AREA = 0.75  # of the largest possible area, when an image is squeezed into a size
CROPS_FILE = "crops.json"

Size = tuple[int, int]
"""(width, height) in pixels."""

Centre = tuple[float, float]
"""A point of an image, from left and top, 0 to 1."""


@dataclass(frozen=True)
class Crop:
    """The image is resized to `scaled`, then `bucket` is cut out at (`left`, `top`)."""

    bucket: Size
    """The size given to the VAE."""
    scaled: Size
    """The size of the whole resized image, at least `bucket` on both sides.

    If both are equal, nothing is cut off, but the image may be squeezed a little.
    """
    left: int
    top: int


# Geometry


@lru_cache(maxsize=64)
def _cached_buckets(resolution: int, step: int, max_aspect: float) -> tuple[Size, ...]:
    return tuple(make_buckets(resolution, step, max_aspect))


def make_buckets(resolution: int, step: int, max_aspect: float = MAX_ASPECT) -> list[Size]:
    """Returns the sorted bucket sizes.

    Sides are multiples of `step`, the area is at most `resolution` squared and the aspect ratio at
    most `max_aspect`. The square, `resolution` rounded down to `step`, is always among them.
    Requires `resolution` >= `step` and `max_aspect` >= 1.
    """
    assert 0 < step <= resolution and max_aspect >= 1
    area, square = resolution**2, resolution // step * step
    buckets = {(square, square)}
    for short in range(step, square + 1, step):
        long = area // short // step * step
        # If a wider short side allows the same long side, `short` only wastes pixels.
        is_wasteful = (short + step) * long <= area
        if long <= short * max_aspect and not is_wasteful:
            buckets |= {(short, long), (long, short)}
    return sorted(buckets)


def choose_crop(
    width: int,
    height: int,
    resolution: int,
    step: int,
    max_aspect: float = MAX_ASPECT,
    allow_upscale: bool = False,
    centre: Centre = (0.5, 0.5),
) -> Crop:
    """Returns the crop in the bucket whose aspect ratio is nearest to the image's.

    If that bucket is larger than the image and `allow_upscale` is off, the bucket is the largest
    size in multiples of `step` that fits the image, with the same limits on area and ratio. A side
    below `step` is enlarged to one step. The point `centre` of the image is as near to the middle
    of the crop as the edges allow.
    """
    assert width > 0 and height > 0

    def distance(size: Size) -> float:
        return abs(math.log(size[0] / size[1]) - math.log(width / height))

    bucket = min(
        _cached_buckets(resolution, step, max_aspect),
        key=lambda size: (distance(size), -size[0] * size[1], size),
    )
    if not allow_upscale and (bucket[0] > width or bucket[1] > height):
        bucket = min(
            _sizes_within(width, height, resolution, step, max_aspect),
            key=lambda size: (-size[0] * size[1], distance(size), size),
        )
    # The larger ratio: with the smaller one, one side of the image would not fill the bucket.
    scale = max(bucket[0] / width, bucket[1] / height)
    scaled = max(bucket[0], round(width * scale)), max(bucket[1], round(height * scale))
    left = _crop_start(centre[0], scaled[0], bucket[0])
    top = _crop_start(centre[1], scaled[1], bucket[1])
    return Crop(bucket, scaled, left, top)


def _crop_start(centre: float, whole: int, part: int) -> int:
    """Returns the start of `part` of `whole` pixels that puts `centre` nearest to its middle."""
    return min(max(math.floor(centre * whole - part / 2), 0), whole - part)


def _sizes_within(
    width: int, height: int, resolution: int, step: int, max_aspect: float
) -> list[Size]:
    """Returns the tallest size that fits for each allowed width.

    A side shorter than `step` counts as one step.
    """
    sizes = []
    for w in range(step, min(max(width, step), resolution**2 // step) + 1, step):
        h = int(min(max(height, step), w * max_aspect, resolution**2 // w)) // step * step
        if h >= step and w <= h * max_aspect:
            sizes.append((w, h))
    return sizes


def squeeze_whole_image(
    width: int, height: int, resolution: int, step: int, allow_upscale: bool = False
) -> Crop:
    """Returns a crop that contains the whole image, squeezed into the size nearest to its shape.

    The size is the least squeezed of those that use at least `MIN_USED_AREA` of the pixels. The
    limits on area and enlargement are the ones of `choose_crop`; there is none on aspect ratio.
    """
    assert width > 0 and height > 0
    enlargement = max(1.0, resolution / math.sqrt(width * height)) if allow_upscale else 1.0
    max_width = max(step, int(width * enlargement + 0.5))
    max_height = max(step, int(height * enlargement + 0.5))
    sizes = []
    for w in range(step, min(max_width, resolution**2 // step) // step * step + 1, step):
        nearest = round(w * height / width / step) * step
        h = min(nearest, max_height // step * step, resolution**2 // w // step * step)
        sizes.append((w, max(h, step)))
    sizes = [size for size in sizes if size[0] * size[1] <= resolution**2] or [(step, step)]

    largest = max(w * h for w, h in sizes)
    ratio = math.log(width / height)
    bucket = min(
        (size for size in sizes if size[0] * size[1] >= MIN_USED_AREA * largest),
        key=lambda size: (abs(math.log(size[0] / size[1]) - ratio), -size[0] * size[1]),
    )
    return Crop(bucket, bucket, 0, 0)


def box_of(crop: Crop) -> tuple[float, float, float, float]:
    """Returns the part of the image that is seen: left, top, right and bottom, each 0 to 1."""
    width, height = crop.scaled
    right, bottom = crop.left + crop.bucket[0], crop.top + crop.bucket[1]
    return crop.left / width, crop.top / height, right / width, bottom / height


def share_seen(crop: Crop) -> float:
    """Returns the fraction of the image's area that is seen, 0 to 1."""
    return crop.bucket[0] * crop.bucket[1] / (crop.scaled[0] * crop.scaled[1])


def apply_crop(image: Image.Image, crop: Crop) -> Image.Image:
    """Returns the pixels of the crop, resampled with LANCZOS.

    Only the part that is seen is resized. Otherwise a strip of 1 x 9000 pixels would become
    64 x 576,000.
    """
    left, top, right, bottom = box_of(crop)
    # Rounding may exceed the edge by a tiny amount, which Pillow refuses.
    box = (
        left * image.width,
        top * image.height,
        min(right * image.width, image.width),
        min(bottom * image.height, image.height),
    )
    return image.resize(crop.bucket, Image.Resampling.LANCZOS, box=box)


# Crops moved by hand


def read_crop_centres(dataset: Path) -> dict[Path, Centre]:
    """Returns the centre of each moved crop by the stem of its image; {} if the file is damaged."""
    try:
        rows = json.loads((dataset / OWN_FOLDER / CROPS_FILE).read_bytes())
        return {dataset / name: checked_centre(centre) for name, centre in rows.items()}
    except (OSError, ValueError, TypeError, AttributeError, DatasetError):
        return {}


def checked_centre(centre: object) -> Centre:
    """Returns the centre of a crop. Raises `DatasetError` if it is not two numbers from 0 to 1."""
    try:
        x, y = (round(float(value), 4) for value in centre)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        x = y = math.nan
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise DatasetError("The centre of a crop must be two numbers from 0 to 1.")
    return x, y

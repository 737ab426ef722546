"""Which size each picture is trained at and which part of it is seen: pure functions of its width and height.

No picture is ever left out: each gets a crop. Nothing is enlarged unless asked, except a side shorter than one step.
"""

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from trainer.data.dataset_files import OWN_FOLDER
from trainer.errors import DatasetError

MAX_ASPECT = 2.0
CROPS_FILE = "crops.json"

Centre = tuple[float, float]
"""The point of a picture that should be in the middle of its crop, from left and top, 0 to 1."""


@dataclass(frozen=True)
class Crop:
    """The picture is resized to `scaled`, then `bucket` is cut out at (`left`, `top`). (width, height) in pixels."""

    bucket: tuple[int, int]
    """Size of the pixels fed to the VAE."""
    scaled: tuple[int, int]
    """Size of the whole picture after resizing, at least `bucket` on both sides. Equal to it, the picture may be squeezed a little."""
    left: int
    top: int


@lru_cache(maxsize=64)
def _buckets(resolution: int, step: int, max_aspect: float) -> tuple[tuple[int, int], ...]:
    return tuple(make_buckets(resolution, step, max_aspect))


def make_buckets(
    resolution: int, step: int, max_aspect: float = MAX_ASPECT
) -> list[tuple[int, int]]:
    """Sorted (width, height): multiples of `step`, area at most `resolution` squared, ratio at most `max_aspect`.

    The square, `resolution` rounded down to `step`, is always there. Needs `resolution` >= `step`, `max_aspect` >= 1.
    """
    assert 0 < step <= resolution and max_aspect >= 1
    area, square = resolution**2, resolution // step * step
    buckets = {(square, square)}
    for short in range(step, square + 1, step):
        long = area // short // step * step
        wider_fits = (short + step) * long <= area  # then `short` wastes pixels for no other ratio
        if long <= short * max_aspect and not wider_fits:
            buckets |= {(short, long), (long, short)}
    return sorted(buckets)


def choose_crop(
    width: int,
    height: int,
    resolution: int,
    step: int,
    max_aspect: float = MAX_ASPECT,
    allow_upscale: bool = False,
    centre: tuple[float, float] = (0.5, 0.5),
) -> Crop:
    """The crop in the bucket whose aspect ratio is nearest to that of a `width` x `height` picture.

    The point `centre` of the picture (from left and top, 0 to 1) is as near to the middle of the crop as the edges let it be.

    Where that bucket is larger than the picture and `allow_upscale` is off, the largest size in multiples of `step`
    that fits the picture (same limits on area and ratio) takes its place. A side below `step` is enlarged to one step.
    """
    assert width > 0 and height > 0
    ratio = math.log(width / height)

    def distance(size: tuple[int, int]) -> float:
        return abs(math.log(size[0] / size[1]) - ratio)

    bucket = min(
        _buckets(resolution, step, max_aspect),
        key=lambda size: (distance(size), -size[0] * size[1], size),
    )
    if not allow_upscale and (bucket[0] > width or bucket[1] > height):
        fitting = _sizes_within(width, height, resolution, step, max_aspect)
        bucket = min(fitting, key=lambda size: (-size[0] * size[1], distance(size), size))
    scale = max(bucket[0] / width, bucket[1] / height)
    scaled = max(bucket[0], round(width * scale)), max(bucket[1], round(height * scale))
    left, top = (
        min(max(math.floor(place * whole - part / 2), 0), whole - part)
        for place, whole, part in zip(centre, scaled, bucket, strict=True)
    )
    return Crop(bucket, scaled, left, top)


def whole_picture(
    width: int, height: int, resolution: int, step: int, allow_upscale: bool = False
) -> Crop:
    """Nothing is cut off: the picture is squeezed into the size, in multiples of `step`, that is nearest to its own shape.

    Of the sizes that waste at most a quarter of the pixels the least squeezed; within the same limits on area and enlarging
    as `choose_crop`.
    """
    assert width > 0 and height > 0
    enlargement = max(1.0, resolution / math.sqrt(width * height)) if allow_upscale else 1.0
    widest, highest = (
        max(step, int(width * enlargement + 0.5)),
        max(step, int(height * enlargement + 0.5)),
    )
    sizes = []
    for w in range(step, min(widest, resolution**2 // step) // step * step + 1, step):
        h = min(
            round(w * height / width / step) * step,
            highest // step * step,
            resolution**2 // w // step * step,
        )
        sizes.append((w, max(h, step)))
    sizes = [size for size in sizes if size[0] * size[1] <= resolution**2] or [(step, step)]
    largest = max(w * h for w, h in sizes)
    ratio = math.log(width / height)
    roomy = [size for size in sizes if size[0] * size[1] >= 0.75 * largest]
    bucket = min(
        roomy, key=lambda size: (abs(math.log(size[0] / size[1]) - ratio), -size[0] * size[1])
    )
    return Crop(bucket, bucket, 0, 0)


def _sizes_within(
    width: int, height: int, resolution: int, step: int, max_aspect: float
) -> list[tuple[int, int]]:
    """For each allowed width the tallest size that fits; a side shorter than `step` counts as one step."""
    sizes = []
    for w in range(step, min(max(width, step), resolution**2 // step) + 1, step):
        h = int(min(max(height, step), w * max_aspect, resolution**2 // w)) // step * step
        if h >= step and w <= h * max_aspect:
            sizes.append((w, h))
    return sizes


def box_of(crop: Crop) -> tuple[float, float, float, float]:
    """The part of the picture that is seen: left, top, right and bottom, each from 0 to 1."""
    (width, height), (right, bottom) = (
        crop.scaled,
        (crop.left + crop.bucket[0], crop.top + crop.bucket[1]),
    )
    return crop.left / width, crop.top / height, right / width, bottom / height


def apply_crop(image: Image.Image, crop: Crop) -> Image.Image:
    """The pixels of `crop`, resampled with LANCZOS.

    Only the part that is seen is resized: a strip of 1 x 9000 pixels would else become 64 x 576,000.
    """
    left, top, right, bottom = box_of(crop)
    # Rounding may step over the edge by a hair, which Pillow refuses.
    box = (
        left * image.width,
        top * image.height,
        min(right * image.width, image.width),
        min(bottom * image.height, image.height),
    )
    return image.resize(crop.bucket, Image.Resampling.LANCZOS, box=box)


def read(dataset: Path) -> dict[Path, Centre]:
    """Stem of each picture whose crop was moved -> its centre. A damaged file is one without crops."""
    try:
        rows = json.loads((dataset / OWN_FOLDER / CROPS_FILE).read_bytes())
        return {dataset / name: centre_of(place) for name, place in rows.items()}
    except (OSError, ValueError, TypeError, AttributeError, DatasetError):
        return {}


def centre_of(place: object) -> Centre:
    """Raises `DatasetError` for what is no place in a picture."""
    try:
        x, y = (round(float(value), 4) for value in place)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise DatasetError("The place of a crop is two numbers from 0 to 1.") from None
    if not (math.isfinite(x) and math.isfinite(y) and 0 <= x <= 1 and 0 <= y <= 1):
        raise DatasetError("The place of a crop is two numbers from 0 to 1.")
    return x, y

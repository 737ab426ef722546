"""Every picture gets a crop, nothing is enlarged unasked, and the crop shown is the crop trained on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trainer.data.buckets import apply_crop, choose_crop, make_buckets

steps = st.sampled_from([8, 32, 64])
resolutions = st.integers(64, 1100)
aspects = st.sampled_from([1.0, 1.5, 2.0, 4.0])
sides = st.one_of(st.integers(1, 80), st.integers(81, 6000))


@settings(deadline=None)  # the machine may be busy
@given(resolutions, steps, aspects)
def test_buckets_keep_their_limits(resolution, step, max_aspect):
    buckets = make_buckets(resolution, step, max_aspect)
    square = resolution // step * step
    assert (square, square) in buckets and buckets == sorted(set(buckets))
    for width, height in buckets:
        assert width % step == height % step == 0 < min(width, height)
        assert width * height <= resolution**2
        assert max(width, height) <= max_aspect * min(width, height)
        assert (height, width) in buckets


@settings(deadline=None)
@given(sides, sides, resolutions, steps, aspects, st.booleans())
def test_every_picture_gets_a_crop(width, height, resolution, step, max_aspect, allow_upscale):
    crop = choose_crop(width, height, resolution, step, max_aspect, allow_upscale)
    assert crop.bucket[0] % step == crop.bucket[1] % step == 0 < min(crop.bucket)
    assert crop.bucket[0] * crop.bucket[1] <= resolution**2
    assert max(crop.bucket) <= max_aspect * min(crop.bucket)
    assert 0 <= crop.left <= crop.scaled[0] - crop.bucket[0]
    assert 0 <= crop.top <= crop.scaled[1] - crop.bucket[1]
    assert crop.bucket[0] == crop.scaled[0] or crop.bucket[1] == crop.scaled[1], (
        "more is cut off than needed"
    )
    if not allow_upscale and min(width, height) >= step * max_aspect:
        assert crop.bucket[0] <= width and crop.bucket[1] <= height
        assert crop.scaled[0] <= width and crop.scaled[1] <= height
    if allow_upscale:
        assert crop.bucket in make_buckets(resolution, step, max_aspect)


@settings(deadline=None)
@given(st.integers(2000, 6000), st.integers(2000, 6000), steps)
def test_large_pictures_land_in_the_nearest_bucket(width, height, step):
    def distance(bucket):
        return abs(np.log(bucket[0] / bucket[1]) - np.log(width / height))

    crop = choose_crop(width, height, 512, step)
    assert distance(crop.bucket) <= min(map(distance, make_buckets(512, step))) + 1e-12


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((512, 512), (512, 512)),
        ((4000, 3000), (576, 448)),
        ((3000, 4000), (448, 576)),
        ((200, 150), (192, 128)),  # smaller than any bucket: its own size, rounded down
        ((300, 2000), (256, 512)),
        ((5, 3000), (64, 128)),  # a side below one step is all that is ever enlarged
    ],
)
def test_known_crops(size, bucket):
    assert choose_crop(*size, 512, 64).bucket == bucket


def test_a_tiny_picture_is_enlarged_when_asked():
    assert choose_crop(100, 100, 512, 64).bucket == (64, 64)
    assert choose_crop(100, 100, 512, 64, allow_upscale=True).bucket == (512, 512)


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.booleans())
def test_applied_crop_has_the_size_of_the_bucket(width, height, allow_upscale):
    crop = choose_crop(width, height, 128, 8, allow_upscale=allow_upscale)
    assert apply_crop(Image.new("RGB", (width, height)), crop).size == crop.bucket


def test_applied_crop_is_resize_then_crop():
    noise = np.random.default_rng(0).integers(0, 255, (300, 640, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    crop = choose_crop(*image.size, 128, 64)
    left, top = crop.left, crop.top
    whole = image.resize(crop.scaled, Image.Resampling.LANCZOS)
    expected = whole.crop((left, top, left + crop.bucket[0], top + crop.bucket[1]))
    difference = np.abs(np.asarray(apply_crop(image, crop)).astype(int) - np.asarray(expected))
    assert difference.max() <= 1


def test_no_upscaling_leaves_pixels_alone():
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    crop = choose_crop(64, 64, 512, 64)
    assert (np.asarray(apply_crop(Image.fromarray(noise), crop)) == noise).all()

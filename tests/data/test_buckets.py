"""Buckets and crops: every image gets one, keeps its shape, and is enlarged only on request."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trainer.data.buckets import (
    Crop,
    apply_crop,
    choose_crop,
    make_buckets,
    share_seen,
    squeeze_whole_image,
)

STEPS = st.sampled_from([8, 32, 64])
RESOLUTIONS = st.integers(64, 1100)
ASPECTS = st.sampled_from([1.0, 1.5, 2.0, 4.0])
SIDES = st.one_of(st.integers(1, 80), st.integers(81, 6000))


def noise(width, height):
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@settings(deadline=None)  # the machine may be busy
@given(RESOLUTIONS, STEPS, ASPECTS)
def test_buckets_respect_step_area_and_aspect(resolution, step, max_aspect):
    buckets = make_buckets(resolution, step, max_aspect)
    square = resolution // step * step
    assert (square, square) in buckets
    assert buckets == sorted(set(buckets))
    for width, height in buckets:
        assert width % step == height % step == 0 < min(width, height)
        assert width * height <= resolution**2
        assert max(width, height) <= max_aspect * min(width, height)
        assert (height, width) in buckets


@settings(deadline=None)
@given(SIDES, SIDES, RESOLUTIONS, STEPS, ASPECTS, st.booleans())
def test_every_image_gets_a_crop_within_the_limits(
    width, height, resolution, step, max_aspect, allow_upscale
):
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
@given(SIDES, SIDES, RESOLUTIONS, STEPS, ASPECTS, st.booleans())
def test_an_image_keeps_its_shape_when_it_is_cropped(
    width, height, resolution, step, max_aspect, allow_upscale
):
    """Both sides are scaled by the same factor, to half a pixel. Otherwise faces get wider."""
    crop = choose_crop(width, height, resolution, step, max_aspect, allow_upscale)
    scale = max(crop.bucket[0] / width, crop.bucket[1] / height)
    assert abs(crop.scaled[0] - width * scale) <= 0.5 + 1e-9
    assert abs(crop.scaled[1] - height * scale) <= 0.5 + 1e-9


@settings(deadline=None)
@given(st.integers(2000, 6000), st.integers(2000, 6000), STEPS)
def test_large_images_get_the_nearest_bucket(width, height, step):
    def distance(bucket):
        return abs(np.log(bucket[0] / bucket[1]) - np.log(width / height))

    crop = choose_crop(width, height, 512, step)
    assert distance(crop.bucket) <= min(map(distance, make_buckets(512, step))) + 1e-12


@pytest.mark.parametrize(
    ("size", "crop"),
    [
        ((512, 512), Crop((512, 512), (512, 512), 0, 0)),
        ((700, 700), Crop((512, 512), (512, 512), 0, 0)),
        ((4000, 3000), Crop((576, 448), (597, 448), 10, 0)),
        ((1000, 1500), Crop((384, 640), (427, 640), 21, 0)),
        # Smaller than any bucket: its own size, rounded down.
        ((200, 150), Crop((192, 128), (192, 144), 0, 8)),
        ((300, 2000), Crop((256, 512), (256, 1707), 0, 597)),
        ((600, 100), Crop((128, 64), (384, 64), 128, 0)),
    ],
)
def test_known_crops_never_change(size, crop):
    assert choose_crop(*size, 512, 64) == crop


def test_only_a_side_below_one_step_is_enlarged():
    assert choose_crop(5, 3000, 512, 64).bucket == (64, 128)
    assert choose_crop(100, 100, 512, 64).bucket == (64, 64)
    assert choose_crop(100, 100, 512, 64, allow_upscale=True).bucket == (512, 512)


def test_share_seen_is_the_cropped_part_of_the_area():
    assert share_seen(choose_crop(600, 100, 512, 64)) == pytest.approx(1 / 3)
    strip = (2048, 512, 512, 64)
    assert share_seen(choose_crop(*strip, max_aspect=2.0)) == pytest.approx(0.42, abs=0.01)
    assert share_seen(choose_crop(*strip, max_aspect=4.0)) == 1
    assert share_seen(squeeze_whole_image(600, 100, 512, 64)) == 1


@settings(deadline=None)
@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.integers(64, 1100),
    st.sampled_from([8, 32, 64]),
    st.booleans(),
)
def test_a_squeezed_image_keeps_about_its_shape_and_the_limits(
    width, height, resolution, step, allow_upscale
):
    crop = squeeze_whole_image(width, height, resolution, step, allow_upscale)
    w, h = crop.bucket
    assert w % step == h % step == 0 < min(w, h)
    assert w * h <= resolution**2
    if not allow_upscale:
        assert w <= max(width, step) and h <= max(height, step)
    if 0.5 < width / height < 2 and min(width, height) >= 8 * step and resolution >= 8 * step:
        assert abs(math.log(w / h) - math.log(width / height)) < 0.25, "squeezed more than a little"


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.booleans())
def test_applied_crop_has_the_size_of_the_bucket(width, height, allow_upscale):
    crop = choose_crop(width, height, 128, 8, allow_upscale=allow_upscale)
    assert apply_crop(Image.new("RGB", (width, height)), crop).size == crop.bucket


def test_applied_crop_equals_resizing_and_cutting():
    image = noise(640, 300)
    crop = choose_crop(*image.size, 128, 64)
    whole = image.resize(crop.scaled, Image.Resampling.LANCZOS)
    right, bottom = crop.left + crop.bucket[0], crop.top + crop.bucket[1]
    expected = np.asarray(whole.crop((crop.left, crop.top, right, bottom)))
    assert np.abs(np.asarray(apply_crop(image, crop)).astype(int) - expected).max() <= 1


def test_an_image_of_its_bucket_size_is_not_resampled():
    image = noise(64, 64)
    crop = choose_crop(64, 64, 512, 64)
    assert (np.asarray(apply_crop(image, crop)) == np.asarray(image)).all()

"""Views and wordings: worked examples, and the same random generator gives the same result."""

import random

import numpy as np
import pytest
from PIL import Image

from trainer import config
from trainer.data.augment import (
    ImageView,
    apply_view,
    image_views,
    variants_per_image,
    vary_caption,
    without_trigger,
)
from trainer.data.buckets import choose_crop

CROP = choose_crop(64, 32, 32, 8, max_aspect=1.0)  # 32 of 64 pixels wide: 16 to spare on each side


def dataset(**changes):
    return config.Dataset(**changes)


def views_of(**changes):
    return image_views(CROP, dataset(**changes), random.Random(0))


def captions_of(wording, settings, count=200):
    return [vary_caption(wording, settings, random.Random(seed)) for seed in range(count)]


# Images


def test_without_options_there_is_one_plain_view():
    assert views_of() == [ImageView(CROP)]


def test_flip_adds_a_mirrored_view():
    plain, mirrored = views_of(flip=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8))
    expected = np.asarray(apply_view(image, plain))[:, ::-1]
    assert np.array_equal(np.asarray(apply_view(image, mirrored)), expected)
    assert plain.cache_key != mirrored.cache_key


def test_random_crops_stay_inside_and_differ():
    views = views_of(random_crop=True, variants=20)
    assert len(views) == 20
    assert views[0] == ImageView(CROP)
    assert len({view.crop.left for view in views}) > 5
    for view in views:
        assert 0 <= view.crop.left <= view.crop.scaled[0] - 32
        assert view.crop.bucket == CROP.bucket
    assert views == views_of(random_crop=True, variants=20)
    assert len(views_of(random_crop=True, variants=5, flip=True)) == 10


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"flip": True},
        {"random_crop": True, "variants": 5},
        {"colour_jitter": 0.1, "variants": 3, "flip": True},
    ],
)
def test_the_estimate_counts_the_views_that_are_prepared(changes):
    run = config.RunConfig(dataset=dataset(**changes))
    assert variants_per_image(run) == len(views_of(**changes))


def test_random_views_of_a_seed_never_change():
    """Another order of draws would give the resumed run of an earlier version other crops."""
    views = views_of(random_crop=True, colour_jitter=0.2, variants=3)
    assert [view.crop.left for view in views] == [16, 24, 19]
    assert views[1].colours == pytest.approx((0.8161937512723, 1.1861859545447, 0.9943710786251))


def test_colour_jitter_stays_within_its_limit():
    views = views_of(colour_jitter=0.2, variants=50)
    factors = np.array([view.colours for view in views[1:]])
    assert factors.shape == (49, 3)
    assert factors.min() >= 0.8
    assert factors.max() <= 1.2
    assert (factors.std(axis=0) > 0.05).all()


def test_colour_factors_are_brightness_contrast_and_saturation():
    grey = Image.new("RGB", (64, 32), (100, 100, 100))
    brighter = apply_view(grey, ImageView(CROP, colours=(1.2, 1.0, 1.0)))
    assert np.asarray(brighter).mean() == pytest.approx(120, abs=1)
    red = Image.new("RGB", (64, 32), (200, 50, 50))
    colourless = apply_view(red, ImageView(CROP, colours=(1.0, 1.0, 0.0)))
    assert len(set(colourless.getpixel((0, 0)))) == 1


# Captions


def test_the_first_tags_stay_and_the_others_are_shuffled():
    settings = dataset(shuffle_tags=True, keep_tags=2, trigger="zorbit")
    captions = captions_of("zorbit, a, b, c, d", settings)
    assert all(caption.startswith("zorbit, a, ") for caption in captions)
    assert len(set(captions)) == 6
    for caption in captions:
        assert sorted(caption.split(", ")) == ["a", "b", "c", "d", "zorbit"]


def test_tag_dropout_drops_its_fraction_of_the_tags():
    settings = dataset(tag_dropout=0.25, keep_tags=0, trigger="zorbit")
    captions = captions_of("zorbit, a, b, c", settings, 1000)
    kept = sum("b" in caption.split(", ") for caption in captions) / 1000
    assert kept == pytest.approx(0.75, abs=0.05)


def test_tag_dropout_never_drops_the_trigger():
    settings = dataset(tag_dropout=0.25, keep_tags=0, trigger="zorbit")
    assert all("zorbit" in caption for caption in captions_of("zorbit, a, b, c", settings))
    everything = dataset(tag_dropout=1.0, trigger="zorbit")
    assert set(captions_of("zorbit, a, b", everything)) == {"zorbit"}


def test_wildcards_choose_one_line_and_one_of_each_choice():
    settings = dataset(caption_wildcards=True, trigger="zorbit")
    captions = set(captions_of("a {red|{dark |light }blue} cat\nanother line", settings))
    wordings = ("a red cat", "a dark blue cat", "a light blue cat", "another line")
    assert captions == {f"zorbit, {wording}" for wording in wordings}
    assert vary_caption("a {red|blue} cat\nb", settings, None) == "zorbit, a red cat"


def test_without_wildcards_braces_are_text():
    assert vary_caption("a {red|blue} cat", dataset(), random.Random(0)) == "a {red|blue} cat"


@pytest.mark.parametrize(
    ("class_words", "trigger", "caption", "expected"),
    [
        (
            "a dog",
            "zor.bit",
            "photo of ZOR.BIT in snow, zor.bits",
            "photo of a dog in snow, zor.bits",
        ),
        ("", "zor.bit", "zor.bit, in snow", "in snow"),
        ("", "zor.bit", "A zor.bit on the sea", "on the sea"),
        ("a dog", "", "photo of a cat", "photo of a cat"),
    ],
)
def test_class_words_replace_the_trigger(class_words, trigger, caption, expected):
    settings = dataset(trigger=trigger, class_words=class_words)
    assert without_trigger(caption, settings) == expected

"""How else pictures and captions are seen: worked examples, and the same draws always give the same."""

import random

import numpy as np
import pytest
from PIL import Image

from trainer import config
from trainer.data.augment import Look, apply_look, looks, vary_caption, without_trigger
from trainer.data.buckets import choose_crop
from trainer.data.captions import clean_caption

CROP = choose_crop(64, 32, 32, 8, max_aspect=1.0)  # 32 of 64 pixels wide, 16 to spare on each side


def dataset(**changes):
    return config.Dataset(**changes)


def many(wording, settings, count=200):
    return [vary_caption(wording, settings, random.Random(seed)) for seed in range(count)]


def test_without_options_there_is_one_plain_look():
    assert looks(CROP, dataset(), random.Random(0)) == [Look(CROP)]


def test_a_mirrored_picture_is_prepared_beside_the_plain_one():
    plain, mirrored = looks(CROP, dataset(flip=True), random.Random(0))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8))
    assert np.array_equal(
        np.asarray(apply_look(image, mirrored)), np.asarray(apply_look(image, plain))[:, ::-1]
    )
    assert plain.facts != mirrored.facts


def test_random_crops_stay_inside_and_differ():
    found = looks(CROP, dataset(random_crop=True, variants=20), random.Random(0))
    assert (
        len(found) == 20 and found[0] == Look(CROP) and len({look.crop.left for look in found}) > 5
    )
    assert all(
        0 <= look.crop.left <= look.crop.scaled[0] - 32 and look.crop.bucket == CROP.bucket
        for look in found
    )
    assert found == looks(CROP, dataset(random_crop=True, variants=20), random.Random(0))
    assert (
        len(looks(CROP, dataset(random_crop=True, variants=5, flip=True), random.Random(0))) == 10
    )


def test_jitter_changes_brightness_contrast_and_saturation_within_its_share():
    found = looks(CROP, dataset(colour_jitter=0.2, variants=50), random.Random(0))
    factors = np.array([look.colours for look in found[1:]])
    assert (
        factors.shape == (49, 3)
        and factors.min() >= 0.8
        and factors.max() <= 1.2
        and (factors.std(axis=0) > 0.05).all()
    )
    grey = Image.new("RGB", (64, 32), (100, 100, 100))
    assert np.asarray(
        apply_look(grey, Look(CROP, colours=(1.2, 1.0, 1.0)))
    ).mean() == pytest.approx(120, abs=1)
    colourless = apply_look(
        Image.new("RGB", (64, 32), (200, 50, 50)), Look(CROP, colours=(1.0, 1.0, 0.0))
    )
    assert len(set(colourless.getpixel((0, 0)))) == 1


def test_the_first_tags_stay_and_the_others_are_shuffled():
    settings = dataset(shuffle_tags=True, keep_tags=2, trigger="zorbit")
    found = many("zorbit, a, b, c, d", settings)
    assert all(caption.startswith("zorbit, a, ") for caption in found) and len(set(found)) == 6
    assert all(sorted(caption.split(", ")) == ["a", "b", "c", "d", "zorbit"] for caption in found)


def test_tags_are_dropped_by_their_share_and_never_the_trigger():
    settings = dataset(tag_dropout=0.25, keep_tags=0, trigger="zorbit")
    found = many("zorbit, a, b, c", settings, 1000)
    assert all("zorbit" in caption for caption in found)
    assert 0.7 < sum("b" in caption.split(", ") for caption in found) / 1000 < 0.8
    assert set(many("zorbit, a, b", dataset(tag_dropout=1.0, trigger="zorbit"))) == {"zorbit"}


def test_wildcards_and_lines_are_chosen_from():
    settings = dataset(caption_wildcards=True, trigger="zorbit")
    found = set(many("a {red|{dark |light }blue} cat\nanother line", settings))
    assert found == {
        f"zorbit, {text}"
        for text in ("a red cat", "a dark blue cat", "a light blue cat", "another line")
    }
    assert vary_caption("a {red|blue} cat\nb", settings, None) == "zorbit, a red cat"
    assert (
        vary_caption("a {red|blue} cat", dataset(), random.Random(0)) == "a {red|blue} cat"
    )  # off: as it is written


def test_lines_are_kept_apart_only_where_asked():
    assert clean_caption("one\n\ntwo\t\x07") == (
        "one, two",
        ["held control characters: they were removed"],
    )
    assert clean_caption("one\n\ntwo\t\x07", separate_lines=True) == (
        "one\ntwo",
        ["held control characters: they were removed"],
    )


def test_the_class_takes_the_place_of_the_trigger():
    settings = dataset(trigger="zor.bit", class_words="a dog")
    assert (
        without_trigger("photo of ZOR.BIT in snow, zor.bits", settings)
        == "photo of a dog in snow, zor.bits"
    )
    assert without_trigger("zor.bit, in snow", dataset(trigger="zor.bit")) == "in snow"
    assert without_trigger("A zor.bit on the sea", dataset(trigger="zor.bit")) == "on the sea"

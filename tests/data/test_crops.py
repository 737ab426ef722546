"""A crop goes where it is wanted, stays there, and what is shown is what the VAE is given."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from trainer import config
from trainer.curation import crop_edits, history
from trainer.data import buckets
from trainer.data.image_stats import focus_of
from trainer.data.scan import crop_of, scan_dataset
from trainer.errors import DatasetError


def spotted(width: int, height: int, x: float, y: float, size: int = 12) -> Image.Image:
    """A bright spot on plain grey."""
    image = Image.new("RGB", (width, height), (90, 90, 90))
    centre = x * width, y * height
    ImageDraw.Draw(image).rectangle(
        [centre[0] - size, centre[1] - size, centre[0] + size, centre[1] + size],
        fill=(250, 240, 30),
    )
    return image


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "set"
    place.mkdir()
    for name, x in (("left", 0.15), ("right", 0.85)):
        spotted(240, 96, x, 0.5).save(place / f"{name}.png")
        (place / f"{name}.txt").write_text("a spot")
    return place


def settings_with(**changes) -> config.Dataset:
    return config.Dataset(resolution=64, bucket_step=8, max_aspect=1.0, **changes)


def middle_of(item, chosen: config.Dataset) -> float:
    left, _, right, _ = buckets.box_of(crop_of(item, chosen))
    return (left + right) / 2


def test_each_mode_keeps_what_it_says(folder):
    left, right = scan_dataset(folder, config.Dataset(resolution=64, bucket_step=8))[0]
    assert (
        middle_of(left, settings_with())
        == middle_of(right, settings_with())
        == pytest.approx(0.5, abs=0.01)
    )
    salient = settings_with(crop="salient")
    assert middle_of(left, salient) < 0.3 and middle_of(right, salient) > 0.7
    whole = crop_of(left, settings_with(crop="none"))
    assert buckets.box_of(whole) == (0, 0, 1, 1) and whole.bucket[0] > 2 * whole.bucket[1]


@pytest.mark.parametrize(("x", "y"), [(0.2, 0.3), (0.8, 0.2), (0.5, 0.75)])
def test_what_stands_out_is_found(x, y):
    found = focus_of(spotted(300, 300, x, y).convert("L"))
    assert math.dist(found, (x, y)) < 0.12
    assert focus_of(Image.new("L", (300, 200), 7)) == (0.5, 0.5)


@settings(deadline=None)
@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.integers(64, 1100),
    st.sampled_from([8, 32, 64]),
    st.booleans(),
)
def test_the_whole_picture_keeps_its_shape_and_limits(
    width, height, resolution, step, allow_upscale
):
    crop = buckets.squeeze_whole_image(width, height, resolution, step, allow_upscale)
    w, h = crop.bucket
    assert w % step == h % step == 0 < min(w, h) and w * h <= resolution**2
    if not allow_upscale:
        assert w <= max(width, step) and h <= max(height, step)
    if 0.5 < width / height < 2 and min(width, height) >= 8 * step and resolution >= 8 * step:
        assert abs(math.log(w / h) - math.log(width / height)) < 0.25, "squeezed more than a little"


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(0, 1), st.floats(0, 1))
def test_a_moved_crop_stays_inside(width, height, x, y):
    crop = buckets.choose_crop(width, height, 512, 64, centre=(x, y))
    assert (
        0 <= crop.left <= crop.scaled[0] - crop.bucket[0]
        and 0 <= crop.top <= crop.scaled[1] - crop.bucket[1]
    )
    plain = buckets.choose_crop(width, height, 512, 64)
    assert (plain.bucket, plain.scaled) == (crop.bucket, crop.scaled)
    assert plain.left == (plain.scaled[0] - plain.bucket[0]) // 2


def test_a_moved_crop_is_kept_and_taken_back(folder):
    picture = folder / "left.png"
    history.apply(
        folder, "Moved the crop of left.png", [crop_edits.move(folder, picture, (0.9, 0.5))]
    )
    items, findings = scan_dataset(folder, config.Dataset(resolution=64, bucket_step=8))
    assert [item.crop_centre for item in items] == [(0.9, 0.5), None]
    assert (
        middle_of(items[0], settings_with()) > 0.7
        and middle_of(items[0], settings_with(crop="none")) > 0.7
    )
    assert not [finding for finding in findings if ".atelier" in finding.file]
    history.apply(folder, "Put back", [crop_edits.move(folder, picture, None)])
    assert scan_dataset(folder, config.Dataset(resolution=64, bucket_step=8))[0][0].crop_centre is None
    history.undo(folder)
    history.undo(folder)
    assert not (folder / ".atelier" / "crops.json").exists()


@pytest.mark.parametrize("place", [(2, 0), (float("nan"), 0), ("a", "b"), (0.5,), None, {}])
def test_a_place_that_is_none_is_refused(folder, place):
    if place is not None:
        with pytest.raises(DatasetError, match="two numbers"):
            crop_edits.move(folder, folder / "left.png", place)
    (folder / ".atelier").mkdir()
    (folder / ".atelier" / "crops.json").write_text(json.dumps({"left": place}))
    assert buckets.read_crop_centres(folder) == {}


def test_what_is_shown_is_what_the_vae_is_given(folder, tiny_run, monkeypatch):
    """The overlay of the page, cut out of the picture, is the tensor."""
    from app.actions import datasets
    from trainer.data import latent_cache
    from trainer.runs import run_folder
    from trainer.runs.events import EventLog
    from trainer.training import setup

    history.apply(folder, "Moved", [crop_edits.move(folder, folder / "left.png", (0.3, 0.5))])
    given, real = [], latent_cache.encode_image
    monkeypatch.setattr(
        latent_cache,
        "encode_image",
        lambda vae, pixels: (given.append(pixels), real(vae, pixels))[1],
    )
    run = tiny_run({"dataset.folder": str(folder), "dataset.crop": "salient"})
    place = run_folder.create(run)
    setup.prepare(run, place, EventLog(place / "events.jsonl"))
    items, _ = scan_dataset(folder, config.Dataset(resolution=32, bucket_step=8))
    assert len(given) == len(items) == 2
    for item, pixels in zip(items, given, strict=True):
        overlay = datasets.crop_view(item, run.dataset)
        image = Image.open(item.path)
        left, top, right, bottom = (overlay["box"][i] * image.size[i % 2] for i in range(4))
        seen = image.resize(
            tuple(overlay["bucket"]), Image.Resampling.LANCZOS, box=(left, top, right, bottom)
        )
        expected = np.asarray(seen, dtype=np.float32) / 127.5 - 1
        assert np.abs(pixels[0].permute(1, 2, 0).numpy() - expected).max() < 0.02

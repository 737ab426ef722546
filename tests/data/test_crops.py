"""Crop centres: by mode, moved by hand, and the same on the page as in training."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from trainer import config
from trainer.curation import crop_edits, history
from trainer.data import buckets
from trainer.data.scan import crop_of, scan_dataset
from trainer.errors import DatasetError


def spotted(width: int, height: int, x: float, y: float, size: int = 12) -> Image.Image:
    """Returns a bright spot on a plain grey background."""
    image = Image.new("RGB", (width, height), (90, 90, 90))
    left, top = x * width - size, y * height - size
    box = [left, top, left + 2 * size, top + 2 * size]
    ImageDraw.Draw(image).rectangle(box, fill=(250, 240, 30))
    return image


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for name, x in (("left", 0.15), ("right", 0.85)):
        spotted(240, 96, x, 0.5).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("a spot")
    return folder


def square(**changes) -> config.Dataset:
    return config.Dataset(resolution=64, bucket_step=8, max_aspect=1.0, **changes)


def middle_of(item, chosen: config.Dataset) -> float:
    left, _, right, _ = buckets.box_of(crop_of(item, chosen))
    return (left + right) / 2


def test_the_crop_mode_decides_which_part_is_seen(folder):
    left, right = scan_dataset(folder, square()).items
    assert middle_of(left, square()) == pytest.approx(0.5, abs=0.01)
    assert middle_of(right, square()) == pytest.approx(0.5, abs=0.01)
    assert middle_of(left, square(crop="salient")) < 0.3
    assert middle_of(right, square(crop="salient")) > 0.7
    whole = crop_of(left, square(crop="none"))
    assert buckets.box_of(whole) == (0, 0, 1, 1)
    assert whole.bucket[0] > 2 * whole.bucket[1]


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(0, 1), st.floats(0, 1))
def test_a_moved_crop_stays_inside_and_keeps_its_size(width, height, x, y):
    crop = buckets.choose_crop(width, height, 512, 64, centre=(x, y))
    assert 0 <= crop.left <= crop.scaled[0] - crop.bucket[0]
    assert 0 <= crop.top <= crop.scaled[1] - crop.bucket[1]
    central = buckets.choose_crop(width, height, 512, 64)
    assert (central.bucket, central.scaled) == (crop.bucket, crop.scaled)
    assert central.left == (central.scaled[0] - central.bucket[0]) // 2


def test_a_moved_crop_is_saved_and_undone(folder):
    image = folder / "left.png"
    move = crop_edits.move(folder, image, (0.9, 0.5))
    history.apply(folder, "Moved the crop of left.png", [move])
    items, issues = scan_dataset(folder, square())
    assert [item.crop_centre for item in items] == [(0.9, 0.5), None]
    assert middle_of(items[0], square()) > 0.7
    assert middle_of(items[0], square(crop="none")) > 0.7
    assert not [issue for issue in issues if ".atelier" in issue.file]
    history.apply(folder, "Reset", [crop_edits.move(folder, image, None)])
    assert scan_dataset(folder, square()).items[0].crop_centre is None
    history.undo(folder)
    history.undo(folder)
    assert not (folder / ".atelier" / "crops.json").exists()


@pytest.mark.parametrize("centre", [(2, 0), (float("nan"), 0), ("a", "b"), (0.5,), {}])
def test_an_invalid_centre_is_refused(folder, centre):
    with pytest.raises(DatasetError, match="two numbers"):
        crop_edits.move(folder, folder / "left.png", centre)


@pytest.mark.parametrize("centre", [(2, 0), (float("nan"), 0), ("a", "b"), (0.5,), None, {}])
def test_an_invalid_centre_in_the_file_is_ignored(folder, centre):
    (folder / ".atelier").mkdir()
    (folder / ".atelier" / "crops.json").write_text(json.dumps({"left": centre}))
    assert buckets.read_crop_centres(folder) == {}


def test_the_overlay_of_the_page_is_what_the_vae_is_given(folder, tiny_run, monkeypatch):
    from app.actions import datasets
    from trainer.data import latent_cache
    from trainer.runs import run_folder
    from trainer.runs.events import EventLog
    from trainer.training import setup

    history.apply(folder, "Moved", [crop_edits.move(folder, folder / "left.png", (0.3, 0.5))])
    encoded, real = [], latent_cache.encode_image

    def encode(vae, pixels):
        encoded.append(pixels)
        return real(vae, pixels)

    monkeypatch.setattr(latent_cache, "encode_image", encode)
    run = tiny_run({"dataset.folder": str(folder), "dataset.crop": "salient"})
    run_directory = run_folder.create(run)
    setup.prepare(run, run_directory, EventLog(run_directory / "events.jsonl"))
    items = scan_dataset(folder, run.dataset).items
    assert len(encoded) == len(items) == 2
    for item, pixels in zip(items, encoded, strict=True):
        overlay = datasets.crop_view(item, run.dataset)
        image = Image.open(item.path)
        box = tuple(side * image.size[i % 2] for i, side in enumerate(overlay["box"]))
        size = tuple(overlay["bucket"])
        seen = image.resize(size, Image.Resampling.LANCZOS, box=box)
        expected = np.asarray(seen, dtype=np.float32) / 127.5 - 1
        assert np.abs(pixels[0].permute(1, 2, 0).numpy() - expected).max() < 0.02

"""The latent cache: found again, never stale, and a damaged entry counts as missing."""

import shutil

import pytest
import torch
from PIL import Image

from trainer.data import latent_cache
from trainer.data.augment import ImageView
from trainer.data.buckets import choose_crop
from trainer.runs import run_status
from trainer.runs.events import EventLog
from trainer.training import setup


def entries(outputs):
    """Returns the modification time of each entry of the cache."""
    return {path: path.stat().st_mtime_ns for path in (outputs / "cache").rglob("*.safetensors")}


def prepared(run, folder):
    folder.mkdir(parents=True, exist_ok=True)
    return setup.prepare(run, folder, EventLog(folder / "events.jsonl"))


def test_a_second_run_computes_nothing_again(tiny_run, outputs, monkeypatch):
    first = prepared(tiny_run(), outputs / "a").data
    before = entries(outputs)
    assert len(before) == 4 + 5  # latents of four images; four captions and the empty one
    monkeypatch.setattr(latent_cache, "encode_image", None)
    second = prepared(tiny_run(), outputs / "b").data
    assert entries(outputs) == before
    for ours, theirs in zip(second.examples, first.examples, strict=True):
        assert torch.equal(ours.mean, theirs.mean)
        conditioning = (data.texts[ours.caption]["prompt_embeds"] for data in (first, second))
        assert torch.equal(*conditioning)


def test_only_changed_files_are_encoded_again(tiny_run, tiny_dataset, outputs, tmp_path):
    dataset = shutil.copytree(tiny_dataset, tmp_path / "data")
    changes = {"dataset.folder": str(dataset)}
    prepared(tiny_run(changes), outputs / "a")
    before = entries(outputs)
    image = Image.open(dataset / "00.png")
    image.putpixel((0, 0), (1, 2, 3))
    image.save(dataset / "00.png")
    (dataset / "01.txt").write_text("another caption")
    prepared(tiny_run(changes), outputs / "b")
    after = entries(outputs)
    assert len(after) == len(before) + 2
    assert after.items() >= before.items()


def test_another_crop_is_encoded_again(tiny_run, outputs):
    prepared(tiny_run(), outputs / "a")
    before = entries(outputs)
    prepared(tiny_run({"dataset.max_aspect": 1.0}), outputs / "b")
    assert len(entries(outputs)) == len(before) + 2  # two of the four images are long


def test_a_damaged_entry_is_computed_again(tiny_run, outputs):
    first = prepared(tiny_run(), outputs / "a").data.examples
    for path in entries(outputs):
        path.write_bytes(path.read_bytes()[:20])
    second = prepared(tiny_run(), outputs / "b").data.examples
    for ours, theirs in zip(second, first, strict=True):
        assert torch.equal(ours.mean, theirs.mean)


def test_another_image_view_or_base_has_another_key():
    plain = ImageView(choose_crop(16, 16, 16, 8)).cache_key
    moved = ImageView(choose_crop(64, 16, 16, 8)).cache_key
    keys = {
        latent_cache.latents_key(image, view, vae)
        for image in "ab"
        for view in (plain, moved)
        for vae in ("v1", "v2")
    }
    assert len(keys) == 8
    assert latent_cache.conditioning_key("a", "e1") != latent_cache.conditioning_key("a", "e2")


def test_keys_never_change():
    """With other keys, every dataset would be encoded again after an update."""
    view = ImageView(choose_crop(96, 64, 64, 8), mirrored=True, colours=(1.1, 1.0, 0.9))
    assert view.cache_key == {
        "bucket": (80, 48),
        "scaled": (80, 53),
        "left": 0,
        "top": 2,
        "mirrored": True,
        "colours": (1.1, 1.0, 0.9),
    }
    assert latent_cache.latents_key("a", view.cache_key, "v").startswith("19b1c40864262b62")
    assert latent_cache.conditioning_key("a cat", "e").startswith("bd6eb9bae99e2701")


def test_pixels_are_scaled_to_minus_one_to_one(tmp_path):
    Image.new("RGB", (16, 8), (255, 0, 127)).save(tmp_path / "a.png")
    view = ImageView(choose_crop(16, 8, 16, 8))
    pixels = latent_cache.to_pixels(tmp_path / "a.png", view)
    assert pixels.shape == (1, 3, 8, 16)
    expected = torch.tensor([1.0, -1.0, 127 / 127.5 - 1])
    torch.testing.assert_close(pixels[0, :, 0, 0], expected)


def test_a_mask_is_the_share_of_white_under_each_latent():
    mask = Image.new("L", (64, 32), 0)
    mask.paste(255, (0, 0, 12, 32))
    view = ImageView(choose_crop(64, 32, 64, 8))
    weights = latent_cache.to_mask(mask, view, (4, 8))
    assert weights.shape == (1, 4, 8)
    assert weights[0, 0].tolist() == pytest.approx([1, 0.5, 0, 0, 0, 0, 0, 0], abs=0.01)


def test_an_image_encoded_to_nan_is_left_out_with_a_warning(tiny_run, outputs, monkeypatch):
    real, calls = latent_cache.encode_image, []

    def broken(vae, pixels):
        calls.append(pixels)
        factor = float("nan") if len(calls) == 1 else 1.0
        return {name: factor * tensor for name, tensor in real(vae, pixels).items()}

    monkeypatch.setattr(latent_cache, "encode_image", broken)
    session = prepared(tiny_run(), outputs / "a")
    assert len(session.data.examples) == 3
    (warning,) = run_status.read_status(outputs / "a").warnings
    assert warning.startswith("00.png is left out")

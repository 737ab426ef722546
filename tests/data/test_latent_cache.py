"""The cache: found again, never stale, and a damaged entry is only a miss."""

import shutil

import torch
from PIL import Image

from trainer.data import latent_cache
from trainer.data.augment import ImageView
from trainer.data.buckets import choose_crop
from trainer.runs.events import EventLog
from trainer.training import setup


def entries(outputs):
    return {path: path.stat().st_mtime_ns for path in (outputs / "cache").rglob("*.safetensors")}


def prepared(run, folder):
    folder.mkdir(parents=True, exist_ok=True)
    return setup.prepare(run, folder, EventLog(folder / "events.jsonl"))


def test_a_second_start_makes_nothing_anew(tiny_run, outputs, monkeypatch):
    first = prepared(tiny_run(), outputs / "a")
    before = entries(outputs)
    assert len(before) == 4 + 5  # latents of four pictures; four captions and the empty one
    monkeypatch.setattr(latent_cache, "encode_image", None)
    second = prepared(tiny_run(), outputs / "b")
    assert entries(outputs) == before
    assert all(
        torch.equal(a.mean, b.mean)
        and torch.equal(
            first.texts[a.caption]["prompt_embeds"], second.texts[b.caption]["prompt_embeds"]
        )
        for a, b in zip(first.examples, second.examples, strict=True)
    )


def test_only_what_changed_is_made_anew(tiny_run, tiny_dataset, outputs, tmp_path):
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
    assert len(after) == len(before) + 2 and all(
        after[path] == stamp for path, stamp in before.items()
    )
    prepared(tiny_run(changes | {"dataset.max_aspect": 1.0}), outputs / "c")
    assert len(entries(outputs)) == len(after) + 2  # the two long pictures have another crop now


def test_a_damaged_entry_is_made_anew(tiny_run, outputs):
    first = prepared(tiny_run(), outputs / "a")
    for path in entries(outputs):
        path.write_bytes(path.read_bytes()[:20])
    second = prepared(tiny_run(), outputs / "b")
    assert all(
        torch.equal(a.mean, b.mean) for a, b in zip(first.examples, second.examples, strict=True)
    )


def test_another_base_has_other_entries():
    crop = ImageView(choose_crop(16, 16, 16, 8)).cache_key
    assert (
        len(
            {
                latent_cache.latents_key("a", crop, "v1"),
                latent_cache.latents_key("a", crop, "v2"),
                latent_cache.latents_key("b", crop, "v1"),
            }
        )
        == 3
    )
    assert latent_cache.conditioning_key("a", "e1") != latent_cache.conditioning_key("a", "e2")


def test_pixels_are_the_picture_in_minus_one_to_one(tmp_path):
    Image.new("RGB", (16, 8), (255, 0, 127)).save(tmp_path / "a.png")
    pixels = latent_cache.to_pixels(tmp_path / "a.png", ImageView(choose_crop(16, 8, 16, 8)))
    assert pixels.shape == (1, 3, 8, 16) and torch.allclose(
        pixels[0, :, 0, 0], torch.tensor([1.0, -1.0, 127 / 127.5 - 1])
    )


def test_a_picture_that_gives_no_numbers_is_named_and_left_out(tiny_run, outputs, monkeypatch):
    real, calls = latent_cache.encode_image, iter(range(9))

    def broken(vae, pixels):
        latents = real(vae, pixels)
        return (
            {name: t * float("nan") for name, t in latents.items()} if next(calls) == 0 else latents
        )

    monkeypatch.setattr(latent_cache, "encode_image", broken)
    session = prepared(tiny_run(), outputs / "a")
    assert len(session.data.examples) == 3
    assert b"00.png is left out" in (outputs / "a" / "events.jsonl").read_bytes()

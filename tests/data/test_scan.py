"""Scanning a dataset: items in a fixed order, and an issue for everything odd."""

import hashlib
import json

import pytest

from tests.corpus import PNG, encoded, photo
from trainer import config
from trainer.data.captions import read_caption
from trainer.data.checks import verdict
from trainer.data.issue import Issue
from trainer.data.scan import scan_dataset
from trainer.errors import DatasetError

SMALL = config.Dataset(resolution=64, bucket_step=8)


def put(folder, name, seed=0, caption="a cat", size=(96, 64)):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(photo(*size, seed=seed), "PNG"))
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def messages(issues: list[Issue], file: str) -> str:
    return " ".join(issue.message for issue in issues if issue.file == file)


def test_items_are_sorted_with_their_size_and_hash(tmp_path):
    for seed, name in enumerate(("b.png", "a/z.png", "B.png", "a.png", "ä.png")):
        put(tmp_path, name, seed)
    items, issues = scan_dataset(tmp_path, SMALL)
    order = [item.path.relative_to(tmp_path).as_posix() for item in items]
    assert order == ["B.png", "a.png", "a/z.png", "b.png", "ä.png"]
    assert {(item.width, item.height, item.repeats, item.caption) for item in items} == {
        (96, 64, 1, "a cat")
    }
    assert items[0].sha256 == hashlib.sha256((tmp_path / "B.png").read_bytes()).hexdigest()
    assert [(issue.file, issue.kind) for issue in issues] == [
        ("B.png", "case-twin"),
        ("all captions", "shared-tag"),
    ]
    assert verdict(len(items), issues) == (
        "5 of 5 images are usable, 5 have captions. Few: enough to try; ten or more learn better."
    )


def test_verdict_counts_images_left_out_and_without_captions(tmp_path):
    put(tmp_path, "a.png", 1)
    put(tmp_path, "b.png", 2, caption=None)
    put(tmp_path, "c.png", 3, caption=" ")
    (tmp_path / "d.png").write_bytes(b"<html>")
    items, issues = scan_dataset(tmp_path, SMALL)
    assert verdict(len(items), issues) == (
        "3 of 4 images are usable, 1 has a caption. Too few to learn from: use ten or more."
    )
    assert "d.png" in messages(issues, "d.png")
    assert "No caption" in messages(issues, "b.png")
    assert {issue.level for issue in issues if issue.file == "d.png"} == {"error"}


def test_many_images_are_scanned_in_order_with_progress(tmp_path):
    for number in range(60):
        put(tmp_path, f"{number:03}.png", number, size=(16, 16))
    reported = []
    items, _ = scan_dataset(
        tmp_path,
        config.Dataset(resolution=16, bucket_step=8),
        progress=lambda done, total: reported.append((done, total)),
    )
    assert [item.path.name for item in items] == [f"{number:03}.png" for number in range(60)]
    assert reported == [(done, 60) for done in range(1, 61)]


def test_a_dataset_without_usable_images_raises_one_error_with_reasons(tmp_path):
    with pytest.raises(DatasetError, match="is not a folder"):
        scan_dataset(tmp_path / "gone")
    with pytest.raises(DatasetError, match="contains no images"):
        scan_dataset(tmp_path)
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(b"")
    with pytest.raises(DatasetError) as error:
        scan_dataset(tmp_path)
    assert str(error.value).count("is empty") == 5
    assert "and 3 more" in str(error.value)


def test_images_too_small_to_train_on_are_left_out(tmp_path):
    put(tmp_path, "tiny.png", 3, size=(7, 90))
    put(tmp_path, "usable.png", 2, size=(8, 90))
    items, issues = scan_dataset(tmp_path, SMALL)
    assert [item.path.name for item in items] == ["usable.png"]
    assert "7 x 90" in messages(issues, "tiny.png")


def test_a_folder_named_with_a_number_sets_repeats(tmp_path):
    put(tmp_path, "10_cat/a.png", 1)
    put(tmp_path, "2024_holiday/b.png", 2)
    put(tmp_path, "c.png", 3)
    items, issues = scan_dataset(tmp_path, SMALL)
    assert [item.repeats for item in items] == [10, 1, 1]
    assert "10 repeats" in messages(issues, "10_cat")
    assert not messages(issues, "2024_holiday")


def test_masks_are_paired_with_images_and_are_not_images(tmp_path):
    images = [
        put(tmp_path, name, seed)
        for seed, name in enumerate(("a.png", "b.jpg.png", "d/c.png", "plain.png"))
    ]
    mask_names = ("a.mask.png", "b.jpg-masklabel.png", "d/masks/c.png")
    masks = [put(tmp_path, name, 9, None) for name in mask_names]
    put(tmp_path, "gone.mask.png", 7, None)
    put(tmp_path, "masks/venetian.png", 8)
    items, issues = scan_dataset(tmp_path, SMALL)
    assert {item.path: item.mask for item in items} == {
        **dict(zip(images[:3], masks, strict=True)),
        images[3]: None,
        tmp_path / "masks" / "venetian.png": None,
    }
    assert [issue.file for issue in issues if "mask" in issue.message] == ["gone.mask.png"]


def test_trigger_is_put_in_front_of_captions_without_it(tmp_path):
    put(tmp_path, "a.png", 1, caption="a photo of Maya, smiling")
    put(tmp_path, "b.png", 2, caption="a mayan temple")
    put(tmp_path, "c.png", 3, caption=None)
    items, issues = scan_dataset(tmp_path, SMALL.model_copy(update={"trigger": "maya"}))
    assert [item.caption for item in items] == [
        "a photo of Maya, smiling",
        "maya, a mayan temple",
        "maya",
    ]
    assert "2 have captions" in verdict(len(items), issues)
    assert (tmp_path / "b.txt").read_text(encoding="utf-8") == "a mayan temple"


def test_lines_of_a_caption_are_kept_only_with_wildcards(tmp_path):
    put(tmp_path, "a.png", 1, caption="one\ntwo")
    assert scan_dataset(tmp_path, SMALL).items[0].caption == "one, two"
    wildcards = SMALL.model_copy(update={"caption_wildcards": True})
    assert scan_dataset(tmp_path, wildcards).items[0].caption == "one\ntwo"


def test_metadata_captions_apply_to_folders_below(tmp_path):
    put(tmp_path, "a.png", 1, caption=None)
    put(tmp_path, "deep/er/b.png", 2, caption=None)
    put(tmp_path, "c.png", 3, caption="from txt")
    rows = [
        {"file_name": "a.png", "text": "one"},
        {"file_name": "deep/er/b.png", "prompt": "two"},
        {"file_name": "c.png", "caption": "loses"},
        {"file_name": "gone.png", "text": "lost"},
        ["a list"],
        {"file_name": 3},
    ]
    text = "\n".join(map(json.dumps, rows)) + "\n{broken\n"
    (tmp_path / "metadata.jsonl").write_text(text, encoding="utf-8")
    items, issues = scan_dataset(tmp_path, SMALL)
    assert [item.caption for item in items] == ["one", "from txt", "two"]
    about = messages(issues, "metadata.jsonl")
    assert "3 of its lines" in about
    assert "gone.png" in about
    assert read_caption(tmp_path / "a.png")[0] == "one"


def test_unused_files_are_named(tmp_path):
    put(tmp_path, "a.png")
    for name in ("b.txt", "model.safetensors", "c.npz", "d.npz", "photo.CR2"):
        (tmp_path / name).write_bytes(b"text")
    (tmp_path / "e").write_bytes(PNG)
    _, issues = scan_dataset(tmp_path, SMALL)
    assert "no image of the same name" in messages(issues, "b.txt")
    assert "rename it" in messages(issues, "e")
    assert "(.cr2) are left out" in messages(issues, "photo.CR2")
    assert "1 more .npz" in messages(issues, "c.npz")
    assert "neither an image nor a caption" in messages(issues, "model.safetensors")

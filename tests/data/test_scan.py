"""A folder in any shape becomes items in a fixed order, and everything odd is named."""

import hashlib
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.corpus import PNG, encoded, photo
from trainer.data.captions import clean_caption, decode_text, read_caption, write_caption
from trainer.data.checks import verdict
from trainer.data.dataset_files import caption_path, suffix_of
from trainer.data.issues import Issue
from trainer.data.scan import scan_dataset
from trainer.errors import DatasetError, DiskError


def put(folder, name, seed=0, caption="a cat", size=(96, 64)):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(photo(*size, seed=seed), "PNG"))
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def messages(findings: list[Issue], file: str) -> str:
    return " ".join(finding.message for finding in findings if finding.file == file)


def test_items_are_sorted_measured_and_hashed(tmp_path):
    for seed, name in enumerate(("b.png", "a/z.png", "B.png", "a.png", "ä.png")):
        put(tmp_path, name, seed)
    items, findings = scan_dataset(tmp_path, resolution=64)
    order = [item.path.relative_to(tmp_path).as_posix() for item in items]
    assert order == ["B.png", "a.png", "a/z.png", "b.png", "ä.png"]
    assert {(item.width, item.height, item.repeats, item.caption) for item in items} == {
        (96, 64, 1, "a cat")
    }
    assert items[0].sha256 == hashlib.sha256((tmp_path / "B.png").read_bytes()).hexdigest()
    assert [(finding.file, finding.kind) for finding in findings] == [
        ("B.png", "case-twin"),
        ("all captions", "shared-tag"),
    ]
    assert (
        verdict(len(items), findings)
        == "5 of 5 pictures are usable, 5 have captions. Few: enough to try; ten or more learn better."
    )


def test_verdict_counts_what_is_left_out_and_uncaptioned(tmp_path):
    put(tmp_path, "a.png", 1)
    put(tmp_path, "b.png", 2, caption=None)
    put(tmp_path, "c.png", 3, caption=" ")
    (tmp_path / "d.png").write_bytes(b"<html>")
    items, findings = scan_dataset(tmp_path, resolution=64)
    assert (
        verdict(len(items), findings)
        == "3 of 4 pictures are usable, 1 has a caption. Too few to learn from: use ten or more."
    )
    assert "d.png" in messages(findings, "d.png") and "no caption" in messages(findings, "b.png")
    assert {finding.level for finding in findings if finding.file == "d.png"} == {"error"}


def test_many_pictures_are_checked_in_order_with_progress(tmp_path):
    for number in range(60):
        put(tmp_path, f"{number:03}.png", number, size=(16, 16))
    seen = []
    items, _ = scan_dataset(
        tmp_path, resolution=16, progress=lambda done, total: seen.append((done, total))
    )
    assert [item.path.name for item in items] == [f"{number:03}.png" for number in range(60)]
    assert seen == [(done, 60) for done in range(1, 61)]


def test_nothing_usable_is_one_sentence_with_reasons(tmp_path):
    with pytest.raises(DatasetError, match="is not a folder"):
        scan_dataset(tmp_path / "gone")
    with pytest.raises(DatasetError, match="holds no pictures"):
        scan_dataset(tmp_path)
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(b"")
    with pytest.raises(DatasetError) as error:
        scan_dataset(tmp_path)
    assert str(error.value).count("is empty") == 5 and "and 3 more" in str(error.value)


def test_sizes_and_duplicates_are_named(tmp_path):
    put(tmp_path, "a.png", 1, size=(256, 256))
    put(tmp_path, "b.png", 1, size=(256, 256))
    put(tmp_path, "strip.png", 2, size=(600, 100))
    put(tmp_path, "tiny.png", 3, size=(7, 90))
    items, findings = scan_dataset(tmp_path, resolution=512)
    assert [item.path.name for item in items] == ["a.png", "b.png", "strip.png"]
    assert "upscaled 2.0 times" in messages(findings, "a.png")
    assert "same picture as a.png" in messages(findings, "b.png")
    assert "middle 33 %" in messages(findings, "strip.png")
    assert "7 x 90" in messages(findings, "tiny.png")


def test_kohya_folder_gives_repeats_and_says_so(tmp_path):
    put(tmp_path, "10_cat/a.png", 1)
    put(tmp_path, "2024_holiday/b.png", 2)
    put(tmp_path, "c.png", 3)
    items, findings = scan_dataset(tmp_path, resolution=64)
    assert [item.repeats for item in items] == [10, 1, 1]
    assert "10 repeats" in messages(findings, "10_cat") and not messages(findings, "2024_holiday")


def test_masks_are_paired_and_are_no_pictures(tmp_path):
    pictures = [
        put(tmp_path, name, seed)
        for seed, name in enumerate(("a.png", "b.jpg.png", "d/c.png", "plain.png"))
    ]
    masks = [
        put(tmp_path, name, 9, None)
        for name in ("a.mask.png", "b.jpg-masklabel.png", "d/masks/c.png")
    ]
    put(tmp_path, "gone.mask.png", 7, None)
    put(tmp_path, "masks/venetian.png", 8)
    items, findings = scan_dataset(tmp_path, resolution=64)
    assert {item.path: item.mask for item in items} == {
        **dict(zip(pictures[:3], masks, strict=True)),
        pictures[3]: None,
        tmp_path / "masks" / "venetian.png": None,
    }
    assert [finding.file for finding in findings if "mask" in finding.message] == ["gone.mask.png"]


def test_trigger_is_put_in_front_once(tmp_path):
    put(tmp_path, "a.png", 1, caption="a photo of Maya, smiling")
    put(tmp_path, "b.png", 2, caption="a mayan temple")
    put(tmp_path, "c.png", 3, caption=None)
    items, findings = scan_dataset(tmp_path, resolution=64, trigger="maya")
    assert [item.caption for item in items] == [
        "a photo of Maya, smiling",
        "maya, a mayan temple",
        "maya",
    ]
    assert (
        verdict(len(items), findings)
        == "3 of 3 pictures are usable, 2 have captions. Too few to learn from: use ten or more."
    )
    assert (tmp_path / "b.txt").read_text(encoding="utf-8") == "a mayan temple"


def test_metadata_captions_reach_folders_below(tmp_path):
    put(tmp_path, "a.png", 1, caption=None)
    put(tmp_path, "deep/er/b.png", 2, caption=None)
    put(tmp_path, "c.png", 3, caption="from txt")
    rows = [{"file_name": "a.png", "text": "one"}, {"file_name": "deep/er/b.png", "prompt": "two"}]
    rows += [{"file_name": "c.png", "caption": "loses"}, {"file_name": "gone.png", "text": "lost"}]
    rows += [["a list"], {"file_name": 3}]
    (tmp_path / "metadata.jsonl").write_text(
        "\n".join(map(json.dumps, rows)) + "\n{broken\n", encoding="utf-8"
    )
    items, findings = scan_dataset(tmp_path, resolution=64)
    assert [item.caption for item in items] == ["one", "from txt", "two"]
    about = messages(findings, "metadata.jsonl")
    assert "3 of its lines" in about and "gone.png" in about
    assert read_caption(tmp_path / "a.png")[0] == "one"


def test_caption_files_by_precedence(tmp_path):
    picture = put(tmp_path, "x.png", caption=None)
    for name, text in (("x.png.txt", "third"), ("x.caption", "second"), ("x.txt", "first")):
        (tmp_path / name).write_text(text, encoding="utf-8")
        caption, findings = read_caption(picture)
        assert caption == text
    assert [finding.file for finding in findings] == ["x.caption", "x.png.txt"]


def test_orphans_and_strangers_are_named(tmp_path):
    put(tmp_path, "a.png")
    for name in ("b.txt", "model.safetensors", "c.npz", "d.npz", "photo.CR2"):
        (tmp_path / name).write_bytes(b"text")
    (tmp_path / "e").write_bytes(PNG)
    _, findings = scan_dataset(tmp_path, resolution=64)
    assert "no picture has its name" in messages(findings, "b.txt")
    assert "rename it" in messages(findings, "e") and "cannot be used (.cr2)" in messages(
        findings, "photo.CR2"
    )
    assert "1 more .npz" in messages(findings, "c.npz") and "neither" in messages(
        findings, "model.safetensors"
    )


def test_written_caption_is_read_back(tmp_path):
    picture = put(tmp_path, "x" * 251 + ".png", caption=None)
    write_caption(picture, "żółć 😀")
    assert read_caption(picture) == ("żółć 😀", [])
    assert caption_path(picture).read_bytes() == "żółć 😀".encode()
    assert len(list(tmp_path.iterdir())) == 2


def test_write_caption_follows_no_link(tmp_path):
    picture = put(tmp_path, "x.png", caption=None)
    secret = tmp_path / "secret"
    secret.write_text("old", encoding="utf-8")
    caption_path(picture).symlink_to(secret)
    with pytest.raises(DatasetError, match="is a link"):
        write_caption(picture, "new")
    assert secret.read_text(encoding="utf-8") == "old"


def test_failed_write_keeps_the_old_caption(tmp_path, monkeypatch):
    picture = put(tmp_path, "x.png", caption="old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DiskError, match="No space"):
        write_caption(picture, "new")
    assert read_caption(picture)[0] == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.png", "x.txt"]


@settings(deadline=None)  # the machine may be busy
@given(st.binary(max_size=200))
def test_any_bytes_become_a_clean_line(data):
    text, _ = clean_caption(*decode_text(data))
    assert text == text.strip() and len(text.splitlines()) <= 1
    text.encode("utf-8")
    assert "\0" not in text and "\x1b" not in text


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1))
def test_utf8_captions_are_read_as_they_are(text):
    assert decode_text(text.encode("utf-8")) == (text, [])


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.PNG", ".png"),
        ("....png", ".png"),
        (".png", ""),
        ("a", ""),
        ("a.", ""),
        ("a.png.txt", ".txt"),
        ("", ""),
    ],
)
def test_suffix(name, suffix):
    assert suffix_of(name) == suffix

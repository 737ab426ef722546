"""A issue is cured by one click, originals are kept, and every change is taken back to the byte."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from tests.corpus import JPG, PNG, encoded, frames, hidden_magenta, oriented, photo
from trainer import config
from trainer.cli.main import main
from trainer.curation import caption_edits, fixes, history
from trainer.curation.history import Edit
from trainer.data.captions import read_caption
from trainer.data.scan import scan_dataset
from trainer.errors import DatasetError


def snapshot(folder):
    """Every file of the dataset itself, to the byte."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".atelier" not in path.parts
    }


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "set"
    place.mkdir()
    return place


def write(folder, name, data=PNG, caption: str | bytes | None = "a cat, on a mat"):
    (folder / name).write_bytes(data)
    if caption is not None:
        text = caption if isinstance(caption, bytes) else caption.encode()
        (folder / name).with_suffix(".txt").write_bytes(text)
    return folder / name


def cure(folder, kind: str, name: str, **options) -> int:
    issues = [
        issue
        for issue in scan_dataset(folder, resolution=64, **options)[1]
        if issue.kind == kind
    ]
    assert issues, kind
    return fixes.apply(folder, issues, name)


def seven(seed):
    return encoded(photo(seed=seed), "PNG")


CASES = {
    # kind: (files to write, cure, what must be there afterwards: names, or a check of the folder)
    "unreadable": ({"x.png": b"<html>", "x.txt": b"a"}, "exclude", {"ok.png", "ok.txt"}),
    "misnamed": ({"x": JPG, "x.txt": b"a"}, "rename", {"ok.png", "ok.txt", "x.jpg", "x.txt"}),
    "duplicate": ({"a.png": PNG, "a.txt": b"a", "b.png": PNG, "b.txt": b"a"}, "exclude", {"ok.png", "ok.txt", "a.png", "a.txt"}),
    "animated": ({"x.gif": frames("GIF"), "x.gif.txt": b"a cat"}, "reencode", {"ok.png", "ok.txt", "x.png", "x.txt", "x.gif.txt"}),
    "rotated": ({"x.jpg": oriented("JPEG", 6), "x.txt": b"a"}, "reencode", {"ok.png", "ok.txt", "x.png", "x.txt"}),
    "transparent": ({"x.png": hidden_magenta(), "x.txt": b"a"}, "mask-from-alpha", {"ok.png", "ok.txt", "x.png", "x.mask.png", "x.txt"}),
    "no-caption": ({"old_red-boat 3.png": seven(3)}, "caption-from-name", {"ok.png", "ok.txt", "old_red-boat 3.png", "old_red-boat 3.txt"}),
    "odd-caption": ({"x.png": seven(4), "x.txt": "Рыжая кошка".encode("cp1251")}, "utf8", {"ok.png", "ok.txt", "x.png", "x.txt"}),
    "several-captions": ({"x.png": seven(4), "x.txt": b"a", "x.caption": b"b"}, "exclude", {"ok.png", "ok.txt", "x.png", "x.txt"}),
    "orphan": ({"gone.txt": b"a", "y.mask.png": PNG}, "exclude", {"ok.png", "ok.txt"}),
    "long-caption": ({"x.png": seven(5), "x.txt": b"a tree, " * 60}, "shorten", {"ok.png", "ok.txt", "x.png", "x.txt"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_a_cure_cures_and_is_taken_back(folder, kind):
    files, name, expected = CASES[kind]
    write(folder, "ok.png", seven(9), "something else")
    for file, data in files.items():
        (folder / file).write_bytes(data)
    before = snapshot(folder)
    assert cure(folder, kind, name) > 0
    assert snapshot(folder).keys() == expected
    assert (
        kind not in {issue.kind for issue in scan_dataset(folder, config.Dataset(resolution=64, bucket_step=8))[1]}
        or kind == "transparent"
    )
    if kind == "animated":
        assert read_caption(folder / "x.png")[0] == "a cat"
    if kind == "rotated":
        assert Image.open(folder / "x.png").size == (64, 96)
    if kind == "transparent":
        assert scan_dataset(folder, config.Dataset(resolution=64, bucket_step=8))[0][1].mask == folder / "x.mask.png"
        assert Image.open(folder / "x.mask.png").getextrema() == (0, 255)
    if kind == "no-caption":
        assert (folder / "old_red-boat 3.txt").read_text() == "old red boat"
    if kind == "odd-caption":
        assert (folder / "x.txt").read_text(encoding="utf-8") == "Рыжая кошка"
    history.undo(folder)
    assert snapshot(folder) == before and history.last(folder) is None


def test_captions_of_all_are_cured_at_once(folder):
    for seed in range(6):
        write(folder, f"{seed}.png", seven(seed), f"1girl, thing {seed}")
    before = snapshot(folder)
    assert cure(folder, "shared-tag", "remove-tag") == 6
    assert read_caption(folder / "3.png")[0] == "thing 3"
    assert cure(folder, "no-trigger", "add-trigger", trigger="maya") == 6
    assert read_caption(folder / "3.png")[0] == "maya, thing 3"
    history.undo(folder)
    history.undo(folder)
    assert snapshot(folder) == before


def test_what_cannot_be_cured_is_said(folder):
    write(folder, "IMG_1234.png", caption=None)
    write(folder, "a.jpg", oriented("JPEG", 6))
    with pytest.raises(DatasetError, match="changes nothing"):
        cure(folder, "no-caption", "caption-from-name")
    write(folder, "a.png", seven(2), None)
    before = snapshot(folder)
    with pytest.raises(DatasetError, match=r"a.png is there already"):
        cure(folder, "rotated", "reencode")
    with pytest.raises(DatasetError, match="no cure named"):
        fixes.apply(folder, [], "prayer")
    assert snapshot(folder) == before


def test_check_command_cures_and_takes_back(folder, capsys):
    write(folder, "a.png")
    write(folder, "b.png")
    before = snapshot(folder)
    assert main(["check", str(folder), "--resolution", "64", "--fix", "duplicate", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["pictures"] == 1 and "duplicate" not in {
        issue["kind"] for issue in report["findings"]
    }
    assert main(["check", str(folder), "--resolution", "64", "--undo"]) == 0
    assert "[duplicate]" in capsys.readouterr().out and snapshot(folder) == before
    assert main(["check", str(folder), "--fix", "everything"]) == 1
    assert "unreadable" in capsys.readouterr().err


# The journal


def test_undo_goes_back_step_by_step_and_typing_is_one_step(folder):
    picture = write(folder, "a.png")
    first = snapshot(folder)
    for text in ("a", "a d", "a dog"):
        history.apply(
            folder, "Caption of a.png", [caption_edits.caption_edit(picture, text)], merge="caption"
        )
    second = snapshot(folder)
    history.apply(folder, "Removed a.png", [Edit(picture, None), Edit(folder / "a.txt", None)])
    assert snapshot(folder) == {} and history.last(folder).files == 2
    assert history.undo(folder) == ("Removed a.png", []) and snapshot(folder) == second
    assert history.last(folder).label == "Caption of a.png"
    history.undo(folder)
    assert snapshot(folder) == first
    with pytest.raises(DatasetError, match="nothing to take back"):
        history.undo(folder)


def test_a_change_that_joins_another_and_finds_the_disk_full_is_taken_back_too(folder, monkeypatch):
    picture = write(folder, "a.png")
    first = snapshot(folder)
    history.apply(
        folder, "Caption of a.png", [caption_edits.caption_edit(picture, "a")], merge="caption"
    )
    with monkeypatch.context() as full:
        full.setattr(
            history,
            "_place",
            lambda path, content: (_ for _ in ()).throw(OSError(28, "No space left on device")),
        )
        with pytest.raises(OSError):
            history.apply(
                folder,
                "Caption of a.png",
                [caption_edits.caption_edit(picture, "a dog")],
                merge="caption",
            )
    assert history.undo(folder) == ("Caption of a.png", []) and snapshot(folder) == first


def test_undo_leaves_alone_what_others_changed(folder):
    one, two = write(folder, "a.png", seven(1)), write(folder, "b.png", seven(2))
    history.apply(
        folder,
        "Both",
        [caption_edits.caption_edit(one, "new"), caption_edits.caption_edit(two, "new")],
    )
    (folder / "a.txt").write_text("by hand")
    assert history.undo(folder) == ("Both", ["a.txt"])
    assert (folder / "a.txt").read_text() == "by hand" and (
        folder / "b.txt"
    ).read_text() == "a cat, on a mat"


@pytest.mark.parametrize("after", range(3))
def test_a_change_that_is_cut_off_can_be_taken_back(folder, monkeypatch, after):
    pictures = [write(folder, f"{seed}.png", seven(seed)) for seed in range(3)]
    before, real, done = snapshot(folder), history._place, []

    def cut(path, content):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(path)
        real(path, content)

    monkeypatch.setattr(history, "_place", cut)
    with pytest.raises(KeyboardInterrupt):
        history.apply(
            folder, "Cut", [caption_edits.caption_edit(picture, "new") for picture in pictures]
        )
    monkeypatch.undo()
    assert history.undo(folder) == ("Cut", []) and snapshot(folder) == before


def test_nothing_outside_the_dataset_is_touched(folder, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    (folder / "link.txt").symlink_to(secret)
    (folder / "door").symlink_to(tmp_path)
    for path in (folder / ".." / "secret.txt", folder / "link.txt", folder / "door" / "secret.txt"):
        with pytest.raises(DatasetError):
            history.apply(folder, "Bad", [Edit(path, b"theirs")])
    assert secret.read_text() == "mine" and sorted(os.listdir(tmp_path)) == ["secret.txt", "set"]


# Many captions


def planned(caption, operation):
    changes = caption_edits.plan([("x.png", caption)], operation)
    return changes[0].after if changes else caption


@pytest.mark.parametrize(
    ("operation", "before", "after"),
    [
        (caption_edits.prepend("maya"), "a cat", "maya, a cat"),
        (caption_edits.prepend("maya"), "maya, a cat", "maya, a cat"),
        (caption_edits.prepend("maya, "), "", "maya,"),
        (caption_edits.append("high quality"), "a cat.", "a cat. high quality"),
        (caption_edits.append("high quality"), "a cat", "a cat, high quality"),
        (caption_edits.replace("cat", "dog"), "a cat, catfish", "a dog, dogfish"),
        (caption_edits.replace(r"\bcat\b", "dog", True), "a cat, catfish", "a dog, catfish"),
        (caption_edits.replace(r"(\w+) (\w+)", r"\2 \1", True), "red cat", "cat red"),
        (caption_edits.replace("a.b", "x"), "a.b axb", "x axb"),
        (caption_edits.remove_tag("Red Hat"), "maya, red hat, sea", "maya, sea"),
        (caption_edits.rename_tag("sea", "ocean"), "seaside, sea", "seaside, ocean"),
        (caption_edits.sort_tags(1), "maya, z, a", "maya, a, z"),
        (caption_edits.deduplicate, "a, b, A, c, b", "a, b, c"),
        (caption_edits.replace("", "x"), "a", "a"),
        (caption_edits.replace("cat", "a\nb\x1b[0m"), "cat", "a, b"),
    ],
)
def test_each_operation(operation, before, after):
    assert planned(before, operation) == after


def test_bad_patterns_are_sentences_and_change_nothing(monkeypatch):
    monkeypatch.setattr(caption_edits, "PATTERN_SECONDS", 0.2)
    for find, replacement in (("(", "x"), ("a", r"\1"), ("x" * 2000, ""), ("(a|aa)+$", "")):
        with pytest.raises(DatasetError):
            caption_edits.plan(
                [("x.png", "a" * 60 + "b")], caption_edits.replace(find, replacement, True)
            )
    with pytest.raises(DatasetError, match="larger than"):
        caption_edits.plan([(Path("x.png"), "a" * 2000)], caption_edits.replace("a", "b" * 1000))


def test_tags_are_counted_and_filtered():
    captions = ["Maya, sea", "maya, SEA, sea", "tree"]
    assert caption_edits.tag_counts(captions) == [("Maya", 2), ("sea", 2), ("tree", 1)]
    changes = caption_edits.plan(
        [(str(i), caption) for i, caption in enumerate(captions)],
        caption_edits.append("x"),
        tag="tree",
    )
    assert [(change.image, change.after) for change in changes] == [("2", "tree, x")]

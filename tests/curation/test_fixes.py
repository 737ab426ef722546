"""Fixes: one click removes an issue, and undo restores every byte."""

import json

import pytest
from PIL import Image

from tests.corpus import JPG, PNG, encoded, files_of, frames, hidden_magenta, oriented, photo
from trainer import config
from trainer.cli.main import main
from trainer.curation import fixes, history
from trainer.data.captions import read_caption
from trainer.data.scan import scan_dataset
from trainer.errors import DatasetError

SMALL = config.Dataset(resolution=64, bucket_step=8)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    return folder


def write(folder, name, data=PNG, caption: str | None = "a cat, on a mat"):
    (folder / name).write_bytes(data)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    return folder / name


def issues_of(folder, kind, settings=SMALL):
    return [issue for issue in scan_dataset(folder, settings).issues if issue.kind == kind]


def fix(folder, kind, name, settings=SMALL) -> int:
    issues = issues_of(folder, kind, settings)
    assert issues, kind
    return fixes.apply(folder, issues, name)


def image(seed):
    return encoded(photo(seed=seed), "PNG")


CASES = {
    # kind of issue: (files, fix, names of the files afterwards)
    "unreadable": ({"x.png": b"<html>", "x.txt": b"a"}, "exclude", set()),
    "misnamed": ({"x": JPG, "x.txt": b"a"}, "rename", {"x.jpg", "x.txt"}),
    "duplicate": (
        {"a.png": PNG, "a.txt": b"a", "b.png": PNG, "b.txt": b"a"},
        "exclude",
        {"a.png", "a.txt"},
    ),
    "animated": (
        {"x.gif": frames("GIF"), "x.gif.txt": b"a cat"},
        "reencode",
        {"x.png", "x.txt", "x.gif.txt"},
    ),
    "rotated": (
        {"x.jpg": oriented("JPEG", 6), "x.txt": b"a"},
        "reencode",
        {"x.png", "x.txt"},
    ),
    "transparent": (
        {"x.png": hidden_magenta(), "x.txt": b"a"},
        "mask-from-alpha",
        {"x.png", "x.mask.png", "x.txt"},
    ),
    "no-caption": (
        {"old_red-boat 3.png": image(3)},
        "caption-from-name",
        {"old_red-boat 3.png", "old_red-boat 3.txt"},
    ),
    "odd-caption": (
        {"x.png": image(4), "x.txt": "Рыжая кошка".encode("cp1251")},
        "utf8",
        {"x.png", "x.txt"},
    ),
    "several-captions": (
        {"x.png": image(4), "x.txt": b"a", "x.caption": b"b"},
        "exclude",
        {"x.png", "x.txt"},
    ),
    "orphan": ({"gone.txt": b"a", "y.mask.png": PNG}, "exclude", set()),
    "long-caption": (
        {"x.png": image(5), "x.txt": b"a tree, " * 60},
        "shorten",
        {"x.png", "x.txt"},
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_fix_removes_the_issue_and_is_undone(folder, kind):
    files, name, expected = CASES[kind]
    write(folder, "ok.png", image(9), "something else")
    for file, data in files.items():
        (folder / file).write_bytes(data)
    before = files_of(folder)
    assert fix(folder, kind, name) > 0
    assert files_of(folder).keys() == expected | {"ok.png", "ok.txt"}
    # A transparent image stays transparent, but its mask is used.
    assert kind == "transparent" or not issues_of(folder, kind)
    history.undo(folder)
    assert files_of(folder) == before
    assert history.last(folder) is None


def test_reencoding_saves_the_upright_image_with_its_caption(folder):
    write(folder, "x.jpg", oriented("JPEG", 6), "a boat")
    fix(folder, "rotated", "reencode")
    assert Image.open(folder / "x.png").size == (64, 96)
    assert read_caption(folder / "x.png")[0] == "a boat"


def test_a_mask_is_made_from_transparency_and_used(folder):
    write(folder, "x.png", hidden_magenta())
    fix(folder, "transparent", "mask-from-alpha")
    assert Image.open(folder / "x.mask.png").getextrema() == (0, 255)
    assert scan_dataset(folder, SMALL).items[0].mask == folder / "x.mask.png"


def test_a_caption_is_made_from_the_file_name(folder):
    write(folder, "old_red-boat 3.png", caption=None)
    fix(folder, "no-caption", "caption-from-name")
    assert (folder / "old_red-boat 3.txt").read_text() == "old red boat"


def test_a_caption_is_saved_as_utf8(folder):
    write(folder, "x.png")
    (folder / "x.txt").write_bytes("Рыжая кошка".encode("cp1251"))
    fix(folder, "odd-caption", "utf8")
    assert (folder / "x.txt").read_text(encoding="utf-8") == "Рыжая кошка"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a cat, a dog", "a cat, a dog"),
        ("one two, three four, five six", "one two, three four"),
        ("one two three four five six", "one two three four five"),
    ],
)
def test_a_line_is_cut_at_a_comma_or_else_at_a_space(line, expected):
    def count(texts):
        return [len(text.replace(",", " ,").split()) for text in texts]

    assert fixes.shortened(line, count, 5) == expected


def test_captions_of_all_images_are_fixed_at_once(folder):
    for seed in range(6):
        write(folder, f"{seed}.png", image(seed), f"1girl, thing {seed}")
    before = files_of(folder)
    assert fix(folder, "shared-tag", "remove-tag") == 6
    assert read_caption(folder / "3.png")[0] == "thing 3"
    with_trigger = SMALL.model_copy(update={"trigger": "maya"})
    assert fix(folder, "no-trigger", "add-trigger", with_trigger) == 6
    assert read_caption(folder / "3.png")[0] == "maya, thing 3"
    history.undo(folder)
    history.undo(folder)
    assert files_of(folder) == before


def test_a_fix_that_cannot_be_applied_changes_nothing(folder):
    write(folder, "IMG_1234.png", caption=None)
    with pytest.raises(DatasetError, match="changes nothing"):
        fix(folder, "no-caption", "caption-from-name")
    write(folder, "a.jpg", oriented("JPEG", 6))
    write(folder, "a.png", image(2), None)
    before = files_of(folder)
    with pytest.raises(DatasetError, match=r"a\.png already exists"):
        fix(folder, "rotated", "reencode")
    with pytest.raises(DatasetError, match="Unknown fix prayer"):
        fixes.apply(folder, [], "prayer")
    assert files_of(folder) == before


def test_check_command_fixes_and_undoes(folder, capsys):
    write(folder, "a.png")
    write(folder, "b.png")
    before = files_of(folder)
    assert main(["check", str(folder), "--resolution", "64", "--fix", "duplicate", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["pictures"] == 1
    assert "duplicate" not in {row["kind"] for row in report["findings"]}
    assert main(["check", str(folder), "--resolution", "64", "--undo"]) == 0
    assert "[duplicate]" in capsys.readouterr().out
    assert files_of(folder) == before
    assert main(["check", str(folder), "--fix", "everything"]) == 1
    assert "unreadable" in capsys.readouterr().err

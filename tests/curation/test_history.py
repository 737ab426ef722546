"""The history: every change is undone to the byte, even one that was interrupted."""

import json
import os

import pytest

from tests.corpus import PNG, encoded, files_of, photo
from trainer.curation import caption_edits, history
from trainer.curation.history import Edit
from trainer.errors import DatasetError


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    return folder


def write(folder, name, data=PNG):
    (folder / name).write_bytes(data)
    (folder / name).with_suffix(".txt").write_text("a cat, on a mat")
    return folder / name


def image(seed):
    return encoded(photo(seed=seed), "PNG")


def retype(folder, image, text):
    edit = caption_edits.caption_edit(image, text)
    return history.apply(folder, "Caption of a.png", [edit], merge="caption")


def test_undo_goes_back_step_by_step_and_typing_is_one_step(folder):
    picture = write(folder, "a.png")
    first = files_of(folder)
    for text in ("a", "a d", "a dog"):
        retype(folder, picture, text)
    second = files_of(folder)
    history.apply(folder, "Removed a.png", [Edit(picture, None), Edit(folder / "a.txt", None)])
    assert files_of(folder) == {}
    assert history.last(folder).files == 2

    assert history.undo(folder) == ("Removed a.png", [])
    assert files_of(folder) == second
    assert history.last(folder).label == "Caption of a.png"
    history.undo(folder)
    assert files_of(folder) == first
    with pytest.raises(DatasetError, match="nothing to undo"):
        history.undo(folder)


def test_edits_without_effect_are_not_a_change(folder):
    picture = write(folder, "a.png")
    assert retype(folder, picture, "a cat, on a mat") == 0
    assert history.last(folder) is None


def test_a_change_is_stored_with_hashes_and_a_copy_of_the_old_file(folder):
    """Entries are read by later versions, so their names and keys must not change."""
    picture = write(folder, "a.png")
    history.apply(folder, "New", [caption_edits.caption_edit(picture, "new")], merge="m")
    entry = folder / ".atelier" / "journal" / "000001"
    assert (entry / "0").read_text() == "a cat, on a mat"
    stored = json.loads((entry / "entry.json").read_text())
    assert stored.keys() == {"label", "time", "merge", "edits"}
    assert stored["edits"][0].keys() == {"file", "before", "after"}
    assert (stored["label"], stored["merge"], stored["edits"][0]["file"]) == ("New", "m", "a.txt")


def test_a_merged_change_that_finds_the_disk_full_is_undone_too(folder, monkeypatch):
    picture = write(folder, "a.png")
    first = files_of(folder)
    retype(folder, picture, "a")

    def full(path, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(history, "_write", full)
        with pytest.raises(OSError):
            retype(folder, picture, "a dog")
    assert history.undo(folder) == ("Caption of a.png", [])
    assert files_of(folder) == first


def test_undo_leaves_files_alone_that_somebody_else_changed(folder):
    one, two = write(folder, "a.png", image(1)), write(folder, "b.png", image(2))
    edits = [caption_edits.caption_edit(path, "new") for path in (one, two)]
    history.apply(folder, "Both", edits)
    (folder / "a.txt").write_text("by hand")
    assert history.undo(folder) == ("Both", ["a.txt"])
    assert (folder / "a.txt").read_text() == "by hand"
    assert (folder / "b.txt").read_text() == "a cat, on a mat"


@pytest.mark.parametrize("files_written", range(3))
def test_an_interrupted_change_is_undone(folder, monkeypatch, files_written):
    images = [write(folder, f"{seed}.png", image(seed)) for seed in range(3)]
    before, real, written = files_of(folder), history._write, []

    def interrupted(path, content):
        if len(written) == files_written:
            raise KeyboardInterrupt
        written.append(path)
        real(path, content)

    monkeypatch.setattr(history, "_write", interrupted)
    edits = [caption_edits.caption_edit(path, "new") for path in images]
    with pytest.raises(KeyboardInterrupt):
        history.apply(folder, "Interrupted", edits)
    monkeypatch.undo()
    assert history.undo(folder) == ("Interrupted", [])
    assert files_of(folder) == before


def test_nothing_outside_the_dataset_is_changed(folder, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    (folder / "link.txt").symlink_to(secret)
    (folder / "door").symlink_to(tmp_path)
    for path in (folder / ".." / "secret.txt", folder / "link.txt", folder / "door" / "secret.txt"):
        with pytest.raises(DatasetError):
            history.apply(folder, "Bad", [Edit(path, b"theirs")])
    assert secret.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["secret.txt", "set"]

"""Whole datasets: renamed, copied, removed, restored, exported, and filled with uploads."""

import io
import os
import zipfile

import pytest

from app.actions import dataset_changes, dataset_folders, dataset_view, datasets
from app.actions.uploads import add_files
from app.jobs import run_actions, runs
from tests.app.conftest import ask, png
from trainer import config
from trainer.errors import DatasetError, StateError
from trainer.runs import events, run_folder, run_requests


def exported(name: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(io.BytesIO(b"".join(dataset_folders.export(name))))


def test_a_copy_has_the_crops_but_not_the_history(cats):
    dataset_changes.remove_picture(ask(file="4.png"))
    dataset_changes.move_crop(ask(file="0.png", centre=[0.2, 0.2]))
    assert dataset_folders.duplicate("cats") == "cats-copy"
    assert dataset_folders.duplicate("cats") == "cats-copy-2"
    copied = datasets.root() / "cats-copy" / ".atelier"
    assert (copied / "crops.json").is_file()
    assert not (copied / "journal").exists()


def test_a_renamed_dataset_keeps_its_history(cats):
    dataset_changes.remove_picture(ask(file="4.png"))
    assert dataset_folders.rename("cats", "Big Cats!") == "Big-Cats"
    assert dataset_changes.undo(ask(dataset="Big-Cats"))["label"] == "Removed 4.png"
    dataset_folders.duplicate("Big-Cats")
    with pytest.raises(DatasetError, match="already"):
        dataset_folders.rename("Big-Cats", "Big-Cats-copy")
    with pytest.raises(DatasetError, match="letters or digits"):
        dataset_folders.rename("Big-Cats", "!!!")


def test_a_removed_dataset_can_be_restored_once(cats):
    removed = dataset_folders.remove("cats")
    assert datasets.names() == []
    assert dataset_folders.restore(removed) == "cats"
    assert len(list((datasets.root() / "cats").glob("*.png"))) == 5
    for wrong in ("../../x-1", "cats", None, removed):
        with pytest.raises(DatasetError, match="not in the trash"):
            dataset_folders.restore(wrong)


def test_runs_follow_a_renamed_dataset_and_report_a_missing_one(cats):
    folder, other = (
        run_folder.create(config.RunConfig(dataset=config.Dataset(folder=str(dataset))))
        for dataset in (cats, cats.parent)
    )
    events.EventLog(folder / "events.jsonl").append(events.Stopped(3, "x.safetensors"))
    runs.all_runs.forget()
    dataset_folders.rename("cats", "dogs")
    assert runs.settings(folder).dataset.folder == str(cats.with_name("dogs"))
    assert runs.settings(other).dataset.folder == str(cats.parent)
    dataset_folders.remove("dogs")
    with pytest.raises(StateError, match="dogs of this run is not there any more"):
        run_actions.act(folder.name, "resume")


def test_a_dataset_that_a_run_uses_is_not_moved(cats):
    run = run_folder.create(config.replace(config.RunConfig(), {"dataset.folder": str(cats)}))
    run_requests.request(run, "queued")
    with pytest.raises(DatasetError, match="trains on this dataset"):
        dataset_folders.remove("cats")
    with pytest.raises(DatasetError, match="trains on this dataset"):
        dataset_folders.rename("cats", "other")
    assert datasets.names() == ["cats"]


def test_an_export_contains_every_file_except_those_of_this_program(cats):
    dataset_changes.save_caption(ask(file="0.png", caption="żółć"))
    (cats / "10_more").mkdir()
    (cats / "10_more" / "x.png").write_bytes(png(9))
    with exported("cats") as archive:
        assert archive.testzip() is None
        content = {name: archive.read(name) for name in archive.namelist()}
    on_disk = {}
    for path in cats.rglob("*"):
        if path.is_file() and ".atelier" not in path.parts:
            on_disk[f"cats/{path.relative_to(cats).as_posix()}"] = path.read_bytes()
    assert content == on_disk
    assert len(content) == 11


def test_an_export_prints_names_that_are_not_utf8(cats):
    try:
        (cats / os.fsdecode(b"b\xe9.png")).write_bytes(png(9))
    except OSError:
        pytest.skip("the file system does not allow such a name")
    with exported("cats") as archive:
        assert archive.testzip() is None
        assert "cats/b\\xe9.png" in archive.namelist()


def test_a_trigger_word_is_suggested_if_all_captions_share_it(cats):
    assert datasets.suggest_trigger(datasets.scan("cats").items) == "pic"
    for number in range(5):
        (cats / f"{number}.txt").write_text(f"a photo of cat{number}")
    assert datasets.suggest_trigger(datasets.scan("cats").items) == "", "ordinary words"


def test_all_files_of_a_dropped_folder_arrive(outputs, upload, tmp_path):
    """Similar folders, deep ones, long names, and captions with the same text."""
    deep = "set/1/2/3/4/5/6/7/8/9"
    prompt = (
        "a woman in a red dress, standing in a field of flowers, "
        "highly detailed, best quality, 4k, "
    )
    folders = ["set/a b", "set/a+b", "set/10_cat", "set/20_dog", f"{deep}/x", f"{deep}/y"]
    stems = [f"{folder}/1" for folder in folders]
    stems += [f"set/{prompt * 2}{number:03}" for number in range(5)]
    images = [upload(png(seed), f"{stem}.png") for seed, stem in enumerate(stems)]
    captions = [upload(b"a photo", f"{stem}.txt") for stem in stems[:6]]
    answer = add_files({"dataset": "all", "files": captions + images})
    folder = datasets.resolve("all")
    arrived = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert arrived >= {each["name"] for each in captions + images[:6]}
    items = datasets.scan("all").items
    assert len(items) == 11
    assert [item.caption for item in items].count("a photo") == 6
    assert len(answer["messages"]) == 5, "a message for each file that was renamed"
    assert not [path for path in (tmp_path / "uploads").rglob("*") if path.is_file()]


def test_only_uploaded_files_can_be_added(outputs, upload, tmp_path):
    (tmp_path / "secret.png").write_bytes(png(1))
    sent = upload(png(2), "a.png")
    for path in (
        str(tmp_path / "secret.png"),
        str(tmp_path / "uploads"),
        f"{tmp_path}/uploads/../secret.png",
        "",
        None,
    ):
        with pytest.raises(DatasetError, match="did not arrive"):
            add_files({"dataset": "all", "files": [sent, {"path": path, "name": "b.png"}]})
    assert datasets.names() == []


def test_the_example_is_copied_once(outputs):
    name = datasets.add_example("subject")
    (datasets.root() / name / "own.txt").write_text("mine")
    assert datasets.add_example("subject") == name
    assert (datasets.root() / name / "own.txt").exists()
    assert dataset_view.view(ask(dataset=name))["total"] == 12

"""What the Dataset tab is given, without a browser: pages, findings, changes, datasets moved about and exported."""

import base64
import hashlib
import io
import json
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from app.actions import (
    captioning,
    dataset_changes,
    dataset_folders,
    dataset_images,
    dataset_scans,
    dataset_view,
    datasets,
)
from app.jobs import run_actions, runs
from app.tabs.dataset import add_files
from tests.corpus import encoded, photo
from trainer import config
from trainer.errors import DatasetError, StateError, TrainerError
from trainer.runs import events, run_folder, run_requests

SETTINGS = {
    "resolution": 64,
    "bucket_step": 8,
    "max_aspect": 2,
    "allow_upscale": False,
    "crop": "centre",
    "base": "embedded",
}


def png(seed: int, size=(48, 48), mode="RGB") -> bytes:
    return encoded(photo(*size, mode=mode, seed=seed), "PNG")


@pytest.fixture
def cats(outputs):
    folder = outputs / "datasets" / "cats"
    folder.mkdir(parents=True)
    for seed in range(5):
        (folder / f"{seed}.png").write_bytes(png(seed))
        (folder / f"{seed}.txt").write_text(f"pic, cat {seed}")
    return folder


@pytest.fixture
def upload(tmp_path, monkeypatch):
    """Puts a file where Gradio's upload route does. Returns what the page then sends of it."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))

    def put(data: bytes, name: str) -> dict:
        path = tmp_path / "uploads" / hashlib.sha256(data).hexdigest() / name.rpartition("/")[2]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return {"path": str(path), "name": name}

    return put


def asked(**data) -> dict:
    return {"dataset": "cats", "settings": SETTINGS, **data}


def files(view: dict) -> list[str]:
    return [card["file"] for card in view["cards"]]


def test_pages_filters_and_findings(cats, monkeypatch):
    monkeypatch.setattr(dataset_view, "PAGE", 2)
    (cats / "1.txt").unlink()
    view = dataset_view.view(asked(page=1))
    assert (view["total"], view["pages"], files(view), view["bare"]) == (
        5,
        3,
        ["2.png", "3.png"],
        1,
    )
    assert view["verdict"].startswith("5 of 5") and {"no-caption", "small"} <= {
        group["kind"] for group in view["groups"]
    }
    assert files(dataset_view.view(asked(page=99))) == ["4.png"]
    assert files(dataset_view.view(asked(filter={"kind": "no-caption"}, turn=True))) == ["1.png"]
    assert (
        files(dataset_view.view(asked(filter={"tag": "CAT 3"})))
        == ["3.png"]
        == files(dataset_view.view(asked(filter={"text": "cat 3"})))
    )
    assert view["tags"][0] == ("pic", 4)


def test_captions_are_saved_planned_changed_and_taken_back(cats):
    dataset_view.view(asked())
    assert dataset_changes.save_caption(asked(file="2.png", caption="a dog"))["caption"] == "a dog"
    assert [card["caption"] for card in dataset_view.view(asked(turn=True))["cards"]][
        2
    ] == "a dog"
    wish = asked(operation="replace", find="pic", replacement="photo")
    plan = dataset_changes.preview_edit(wish)
    assert plan["count"] == 4 and plan["changes"][0] == {
        "file": "0.png",
        "before": "pic, cat 0",
        "after": "photo, cat 0",
    }
    assert (cats / "0.txt").read_text() == "pic, cat 0", "a preview writes nothing"
    assert dataset_changes.apply_edit(wish) == {"changed": 4}
    assert (
        dataset_changes.undo(asked()) == {"label": "Changed 4 captions", "kept": []}
        and dataset_view.view(asked())["undo"] == "The caption of 2.png"
    )
    dataset_changes.undo(asked())
    assert (cats / "2.txt").read_text() == "pic, cat 2"


def test_a_change_of_all_captions_takes_in_what_others_wrote_meanwhile(cats):
    dataset_view.view(asked())
    (cats / "3.txt").write_text("written meanwhile")
    dataset_changes.apply_edit(asked(operation="append", text="end"))
    assert (cats / "3.txt").read_text() == "written meanwhile, end" and (
        cats / "2.txt"
    ).read_text() == "pic, cat 2, end"


def test_a_name_that_is_no_utf8_can_be_worked_with(cats):
    try:
        (cats / os.fsdecode(b"b\xe9.png")).write_bytes(png(9))
    except OSError:
        pytest.skip("the file system takes no such name")
    card = next(
        card for card in dataset_view.view(asked())["cards"] if card["file"].startswith("b")
    )
    json.dumps(card, ensure_ascii=False).encode("utf-8")
    assert (
        card["file"] == "b\\xe9.png"
        and dataset_images.thumbnail("cats", card["src"].split("/")[-1].split("?")[0]).is_file()
    )
    dataset_changes.save_caption(asked(file=card["file"], caption="a cat"))
    assert (cats / os.fsdecode(b"b\xe9.txt")).read_text() == "a cat"
    assert files(dataset_view.view(asked(filter={"text": "xe9"}))) == ["b\\xe9.png"]
    with zipfile.ZipFile(io.BytesIO(b"".join(dataset_folders.export("cats")))) as archive:
        assert archive.testzip() is None and "cats/b\\xe9.png" in archive.namelist()


def test_the_lines_of_a_caption_stay_lines(cats):
    (cats / "1.txt").write_text("a cat, sea\na {red|blue} cat, sea\n")
    assert (
        dataset_view.view(asked())["cards"][1]["caption"] == "a cat, sea\na {red|blue} cat, sea"
    )
    dataset_changes.apply_edit(asked(operation="remove", find="sea"))
    assert (cats / "1.txt").read_text() == "a cat\na {red|blue} cat"
    assert (
        dataset_changes.save_caption(asked(file="1.png", caption="one\ntwo"))["caption"]
        == "one\ntwo"
    )
    assert files(dataset_view.view(asked(filter={"tag": "two"}, turn=True))) == ["1.png"]


def test_a_removed_picture_takes_its_own_and_no_other_caption(cats):
    (cats / "2.mask.png").write_bytes(png(2, mode="L"))
    dataset_changes.remove_picture(asked(file="2.png"))
    view = dataset_view.view(asked())
    assert [(card["file"], card["caption"]) for card in view["cards"]][2] == ("3.png", "pic, cat 3")
    assert not list(cats.glob("2.*"))
    dataset_changes.undo(asked())
    assert sorted(path.name for path in cats.glob("2.*")) == ["2.mask.png", "2.png", "2.txt"]


def test_cures_crops_and_masks(cats):
    (cats / "twin.png").write_bytes(png(1))
    assert dataset_changes.cure(asked(kind="duplicate", cure="exclude", file="twin.png")) == {
        "changed": 1
    }
    assert dataset_changes.move_crop(asked(file="0.png", centre=[1, 1]))["moved"] is True
    with pytest.raises(DatasetError, match="two numbers"):
        dataset_changes.move_crop(asked(file="0.png", centre="middle"))
    mask = Image.fromarray(np.repeat(np.uint8([[0, 255]]), 24, 1).repeat(48, 0))
    saved = dataset_changes.save_mask(
        asked(file="0.png", mask=base64.b64encode(encoded(mask, "PNG")).decode())
    )
    card = dataset_view.view(asked())["cards"][0]
    assert card["mask"] == saved["mask"] and card["mask"].startswith("/mask/cats/")
    assert Image.open(dataset_images.mask_image("cats", dataset_images.key_of("0.png"))).getextrema() == (
        0,
        255,
    )
    for bad in (
        "not base64!",
        base64.b64encode(b"no picture").decode(),
        base64.b64encode(png(1, (90, 30))).decode(),
    ):
        with pytest.raises(TrainerError):
            dataset_changes.save_mask(asked(file="0.png", mask=bad))
    assert dataset_changes.save_mask(asked(file="0.png"))["mask"] == ""
    assert dataset_view.view(asked())["cards"][0]["mask"] == ""
    assert dataset_view.crops_overview(asked())["buckets"] == [
        {"size": "48 × 48", "count": 5, "ratio": 1.0}
    ]


@pytest.mark.parametrize(
    "file",
    ["../secret.png", "/etc/passwd", "", None, 3, "gone.png", "0.txt", ".atelier/journal/000001/0"],
)
def test_only_pictures_of_the_dataset_are_touched(cats, file):
    for action in (
        dataset_changes.save_caption,
        dataset_changes.remove_picture,
        dataset_changes.move_crop,
        dataset_changes.save_mask,
    ):
        with pytest.raises(DatasetError):
            action(asked(file=file, caption="x", centre=[0, 0]))


def test_a_long_look_shows_its_progress(cats, monkeypatch):
    import threading

    go, real = threading.Event(), dataset_scans.dataset_scan.scan_dataset

    def slow(*arguments, progress, **options):
        progress(2, 5)
        go.wait(20)
        return real(*arguments, **options)

    monkeypatch.setattr(dataset_scans, "PATIENCE", 0.05)
    monkeypatch.setattr(dataset_scans.dataset_scan, "scan_dataset", slow)
    assert dataset_view.view(asked())["scanning"] == {"done": 2, "total": 5}
    go.set()
    dataset_scans.scan(asked()).ended.wait(20)
    assert dataset_view.view(asked())["total"] == 5


# The datasets themselves


def test_datasets_are_renamed_copied_removed_and_brought_back(cats):
    dataset_view.view(asked())
    dataset_changes.remove_picture(asked(file="4.png"))
    dataset_changes.move_crop(asked(file="0.png", centre=[0.2, 0.2]))
    assert (dataset_folders.duplicate("cats"), dataset_folders.duplicate("cats")) == ("cats-copy", "cats-copy-2")
    copied = datasets.root() / "cats-copy" / ".atelier"
    assert (copied / "crops.json").is_file() and not (copied / "journal").exists()
    assert dataset_folders.rename("cats", "Big Cats!") == "Big-Cats"
    assert dataset_changes.undo(asked(dataset="Big-Cats"))["label"].startswith("Moved the crop")
    with pytest.raises(DatasetError, match="already"):
        dataset_folders.rename("Big-Cats", "cats-copy")
    kept = dataset_folders.remove("Big-Cats")
    assert "Big-Cats" not in datasets.names()
    assert (
        dataset_folders.restore(kept) == "Big-Cats"
        and len(list((datasets.root() / "Big-Cats").glob("*.png"))) == 4
    )
    for wrong in ("../../x-1", "Big-Cats", None, kept):
        with pytest.raises(DatasetError):
            dataset_folders.restore(wrong)


def test_a_run_finds_its_dataset_under_its_new_name(cats):
    """To be resumed, repeated, and read into the form; without the dataset it says at once what is missing."""
    folder, other = (
        run_folder.create(config.RunConfig(dataset=config.Dataset(folder=str(place))))
        for place in (cats, cats.parent)
    )
    events.EventLog(folder / "events.jsonl").append(events.Stopped(3, "x.safetensors"))
    runs.all_runs.forget()
    dataset_folders.rename("cats", "dogs")
    assert runs.settings(folder).dataset.folder == str(cats.with_name("dogs")) and runs.settings(
        other
    ).dataset.folder == str(cats.parent)
    dataset_folders.remove("dogs")
    with pytest.raises(StateError, match="dogs is not there any more"):
        run_actions.act(folder.name, "resume")
    with pytest.raises(DatasetError, match="letters or digits"):
        dataset_folders.rename(dataset_folders.duplicate(datasets.add_example("subject")), "!!!")


def test_a_dataset_in_use_stays_where_it_is(cats):
    run = run_folder.create(config.replace(config.RunConfig(), {"dataset.folder": str(cats)}))
    run_requests.request(run, "queued")
    for action in (dataset_folders.remove, lambda name: dataset_folders.rename(name, "other")):
        with pytest.raises(DatasetError, match="trains on this dataset"):
            action("cats")


def test_the_export_holds_every_file_and_nothing_of_ours(cats):
    dataset_changes.save_caption(asked(file="0.png", caption="żółć"))
    (cats / "10_more").mkdir()
    (cats / "10_more" / "x.png").write_bytes(png(9))
    with zipfile.ZipFile(io.BytesIO(b"".join(dataset_folders.export("cats")))) as archive:
        assert archive.testzip() is None
        inside = {name: archive.read(name) for name in archive.namelist()}
    kept = [path for path in cats.rglob("*") if path.is_file() and ".atelier" not in path.parts]
    on_disk = {f"cats/{path.relative_to(cats).as_posix()}": path.read_bytes() for path in kept}
    assert inside == on_disk and len(inside) == 11


def test_a_captioning_job_that_cannot_start_is_a_sentence(cats):
    assert captioning.status(asked())["state"] == "none"
    with pytest.raises(DatasetError, match="threshold"):
        captioning.start(asked(model="x/y", threshold="much"))
    assert captioning.start(asked(model="--overwrite"))["state"] == "running"
    from tests.browser.conftest import wait_for

    status = wait_for(
        lambda: (now := captioning.status(asked()))["state"] != "running" and now, "the job"
    )
    assert not (cats / "cache").exists(), (
        "the job keeps what it learns of pictures where everything else is kept"
    )
    assert (
        status["state"] == "failed" and "--overwrite is neither a folder nor" in status["message"]
    )


def test_all_of_a_dropped_folder_arrives(outputs, upload, tmp_path):
    """Folders that are alike to an address, deep ones, long names, and captions that say the same."""
    deep, prompt = (
        "set/1/2/3/4/5/6/7/8/9",
        "a woman in a red dress, standing in a field of flowers, highly detailed, best quality, 4k, ",
    )
    folders = ["set/a b", "set/a+b", "set/10_cat", "set/20_dog", f"{deep}/x", f"{deep}/y"]
    stems = [f"{folder}/1" for folder in folders] + [
        f"set/{prompt * 2}{number:03}" for number in range(5)
    ]
    pictures = [upload(png(seed), f"{stem}.png") for seed, stem in enumerate(stems)]
    captions = [upload(b"a photo", f"{stem}.txt") for stem in stems[:6]]
    answer = add_files({"dataset": "all", "files": captions + pictures})
    folder = datasets.resolve("all")
    kept = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert kept >= {each["name"] for each in captions + pictures[:6]}
    items, _ = datasets.scan("all")
    assert len(items) == 11 and [item.caption for item in items].count("a photo") == 6
    assert len(answer["messages"]) == 5, "those with another name are told"
    assert not [path for path in (tmp_path / "uploads").rglob("*") if path.is_file()]


def test_what_was_not_uploaded_is_no_picture_of_a_dataset(outputs, upload, tmp_path):
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

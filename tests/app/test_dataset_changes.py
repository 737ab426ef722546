"""The Dataset tab without a browser: pages of images, issues, and changes that Undo takes back."""

import base64
import json
import os
import threading

import numpy as np
import pytest
from PIL import Image

from app.actions import (
    captioning,
    dataset_changes,
    dataset_images,
    dataset_scans,
    dataset_view,
)
from tests.app.conftest import ask, png
from tests.browser.conftest import wait_for
from tests.corpus import encoded
from trainer.data import scan
from trainer.errors import DatasetError, TrainerError


def files(view: dict) -> list[str]:
    return [card["file"] for card in view["cards"]]


# Pages


def test_a_page_shows_its_images_and_the_issues_of_all(cats, monkeypatch):
    monkeypatch.setattr(dataset_view, "PAGE", 2)
    (cats / "1.txt").unlink()
    view = dataset_view.view(ask(page=1))
    assert (view["total"], view["pages"]) == (5, 3)
    assert files(view) == ["2.png", "3.png"]
    assert view["bare"] == 1
    assert view["verdict"].startswith("5 of 5")
    assert {"no-caption", "small"} <= {group["kind"] for group in view["groups"]}
    assert view["tags"][0] == ("pic", 4)
    last_page = dataset_view.view(ask(page=99))
    assert files(last_page) == ["4.png"]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"kind": "no-caption"}, ["1.png"]),
        ({"tag": "CAT 3"}, ["3.png"]),
        ({"text": "cat 3"}, ["3.png"]),
        ({"text": "2.PNG"}, ["2.png"]),
        ({"tag": "cat"}, []),
    ],
)
def test_a_filter_leaves_only_the_images_that_match(cats, wanted, expected):
    (cats / "1.txt").unlink()
    view = dataset_view.view(ask(filter=wanted))
    assert files(view) == expected
    assert view["matching"] == len(expected)
    assert view["total"] == 5


def test_a_long_scan_shows_its_progress(cats, monkeypatch):
    may_continue, scan_dataset = threading.Event(), scan.scan_dataset

    def slow_scan(*arguments, progress, **options):
        progress(2, 5)
        may_continue.wait(20)
        return scan_dataset(*arguments, **options)

    monkeypatch.setattr(dataset_scans, "PATIENCE", 0.05)
    monkeypatch.setattr(scan, "scan_dataset", slow_scan)
    assert dataset_view.view(ask())["scanning"] == {"done": 2, "total": 5}
    may_continue.set()
    dataset_scans.finished_scan(ask())
    assert dataset_view.view(ask())["total"] == 5


def test_turning_a_page_does_not_scan_again(cats, monkeypatch):
    dataset_view.view(ask())
    (cats / "9.png").write_bytes(png(9))
    assert dataset_view.view(ask(turn=True))["total"] == 5
    assert dataset_view.view(ask())["total"] == 6


# Captions


def test_a_saved_caption_is_shown_at_once(cats):
    dataset_view.view(ask())
    saved = dataset_changes.save_caption(ask(file="2.png", caption="a dog"))
    assert saved["caption"] == "a dog"
    assert saved["undo"] == "The caption of 2.png"
    assert dataset_view.view(ask(turn=True))["cards"][2]["caption"] == "a dog"


def test_a_change_of_all_captions_is_previewed_applied_and_undone(cats):
    dataset_changes.save_caption(ask(file="2.png", caption="a dog"))
    change = ask(operation="replace", find="pic", replacement="photo")
    preview = dataset_changes.preview_edit(change)
    assert preview["count"] == 4
    first = {"file": "0.png", "before": "pic, cat 0", "after": "photo, cat 0"}
    assert preview["changes"][0] == first
    assert (cats / "0.txt").read_text() == "pic, cat 0", "a preview writes nothing"
    assert dataset_changes.apply_edit(change) == {"changed": 4}
    assert (cats / "0.txt").read_text() == "photo, cat 0"
    assert dataset_changes.undo(ask()) == {"label": "Changed 4 captions", "kept": []}
    assert (cats / "0.txt").read_text() == "pic, cat 0"
    assert dataset_view.view(ask())["undo"] == "The caption of 2.png"
    dataset_changes.undo(ask())
    assert (cats / "2.txt").read_text() == "pic, cat 2"


def test_a_change_of_all_captions_includes_what_another_program_wrote_since(cats):
    dataset_view.view(ask())
    (cats / "3.txt").write_text("written meanwhile")
    dataset_changes.apply_edit(ask(operation="append", text="end"))
    assert (cats / "3.txt").read_text() == "written meanwhile, end"
    assert (cats / "2.txt").read_text() == "pic, cat 2, end"


def test_an_image_whose_name_is_not_utf8_can_be_edited(cats):
    try:
        (cats / os.fsdecode(b"b\xe9.png")).write_bytes(png(9))
    except OSError:
        pytest.skip("the file system does not allow such a name")
    cards = dataset_view.view(ask())["cards"]
    card = next(card for card in cards if card["file"].startswith("b"))
    json.dumps(card, ensure_ascii=False).encode("utf-8")
    assert card["file"] == "b\\xe9.png"
    key = card["src"].split("/")[-1].split("?")[0]
    assert dataset_images.thumbnail("cats", key).is_file()
    dataset_changes.save_caption(ask(file=card["file"], caption="a cat"))
    assert (cats / os.fsdecode(b"b\xe9.txt")).read_text() == "a cat"
    assert files(dataset_view.view(ask(filter={"text": "xe9"}))) == ["b\\xe9.png"]


def test_the_lines_of_a_caption_stay_separate(cats):
    text = "a cat, sea\na {red|blue} cat, sea"
    (cats / "1.txt").write_text(text + "\n")
    assert dataset_view.view(ask())["cards"][1]["caption"] == text
    dataset_changes.apply_edit(ask(operation="remove", find="sea"))
    assert (cats / "1.txt").read_text() == "a cat\na {red|blue} cat"
    saved = dataset_changes.save_caption(ask(file="1.png", caption="one\ntwo"))
    assert saved["caption"] == "one\ntwo"
    assert files(dataset_view.view(ask(filter={"tag": "two"}, turn=True))) == ["1.png"]


# Images, crops and masks


def test_a_removed_image_takes_its_caption_and_mask_with_it(cats):
    (cats / "2.mask.png").write_bytes(png(2, mode="L"))
    dataset_changes.remove_picture(ask(file="2.png"))
    card = dataset_view.view(ask())["cards"][2]
    assert (card["file"], card["caption"]) == ("3.png", "pic, cat 3")
    assert not list(cats.glob("2.*"))
    dataset_changes.undo(ask())
    assert sorted(path.name for path in cats.glob("2.*")) == ["2.mask.png", "2.png", "2.txt"]


def test_a_fix_of_one_file_leaves_the_other_files_alone(cats):
    for name in ("twin.png", "triplet.png"):
        (cats / name).write_bytes(png(1))
    answer = dataset_changes.cure(ask(kind="duplicate", cure="exclude", file="twin.png"))
    assert answer == {"changed": 1}
    assert not (cats / "twin.png").exists()
    assert (cats / "triplet.png").exists()
    assert (cats / "1.png").exists()


def test_a_crop_is_moved_and_reset(cats):
    (cats / "wide.png").write_bytes(png(7, (96, 48)))
    settings = ask()["settings"] | {"max_aspect": 1}
    moved = dataset_changes.move_crop(ask(file="wide.png", centre=[1, 1], settings=settings))
    assert moved["moved"] is True
    assert moved["box"] == [0.5, 0, 1, 1]
    reset = dataset_changes.move_crop(ask(file="wide.png", settings=settings))
    assert reset["moved"] is False
    assert reset["box"] == [0.25, 0, 0.75, 1]
    with pytest.raises(DatasetError, match="two numbers"):
        dataset_changes.move_crop(ask(file="0.png", centre="middle"))


def test_a_painted_mask_is_saved_and_removed(cats):
    pixels = np.uint8([[0, 255]]).repeat(24, 1).repeat(48, 0)
    painted = base64.b64encode(encoded(Image.fromarray(pixels), "PNG")).decode()
    saved = dataset_changes.save_mask(ask(file="0.png", mask=painted))
    assert saved["mask"].startswith("/mask/cats/")
    assert dataset_view.view(ask())["cards"][0]["mask"] == saved["mask"]
    mask = dataset_images.mask_image("cats", dataset_images.key_of("0.png"))
    assert (np.asarray(Image.open(mask)) == pixels).all()
    assert dataset_changes.save_mask(ask(file="0.png"))["mask"] == ""
    assert dataset_view.view(ask())["cards"][0]["mask"] == ""


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("not base64!", "did not arrive"),
        (base64.b64encode(b"not an image").decode(), "mask.png"),
        (base64.b64encode(png(1, (90, 30))).decode(), "does not have the shape"),
        (base64.b64encode(bytes(2**21 + 1)).decode(), "too large"),
    ],
)
def test_a_mask_that_cannot_be_used_is_refused(cats, mask, message):
    with pytest.raises(TrainerError, match=message):
        dataset_changes.save_mask(ask(file="0.png", mask=mask))
    assert not list(cats.glob("*mask*"))


def test_the_overview_counts_images_by_the_size_they_are_trained_at(cats):
    (cats / "wide.png").write_bytes(png(7, (96, 48)))
    assert dataset_view.crops_overview(ask())["buckets"] == [
        {"size": "48 × 48", "count": 5, "ratio": 1.0},
        {"size": "80 × 48", "count": 1, "ratio": 80 / 48},
    ]


@pytest.mark.parametrize(
    "file",
    ["../secret.png", "/etc/passwd", "", None, 3, "gone.png", "0.txt", ".atelier/journal/000001/0"],
)
def test_only_images_of_the_dataset_can_be_changed(cats, file):
    for action in (
        dataset_changes.save_caption,
        dataset_changes.remove_picture,
        dataset_changes.move_crop,
        dataset_changes.save_mask,
    ):
        with pytest.raises(DatasetError):
            action(ask(file=file, caption="x", centre=[0, 0]))


# Captions by a model


def test_a_captioning_job_that_cannot_start_reports_why(cats):
    assert captioning.status(ask())["state"] == "none"
    with pytest.raises(DatasetError, match="threshold"):
        captioning.start(ask(model="x/y", threshold="much"))
    assert captioning.start(ask(model="--overwrite"))["state"] == "running"

    def ended():
        status = captioning.status(ask())
        return status["state"] != "running" and status

    status = wait_for(ended, "the end of the job")
    assert status["state"] == "failed"
    assert "--overwrite is neither a folder nor" in status["message"]
    assert not (cats / "cache").exists(), "caches belong into the outputs folder"

"""The Dataset tab: many images, issues, fixes, captions, crops, masks; a reload loses nothing."""

import io
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.actions import datasets
from tests.browser.conftest import open_dataset, wait_for
from tests.corpus import encoded, frames, hidden_magenta, oriented, photo
from tests.curation.test_autocaption import blip  # noqa: F401 (a fixture: the tiny captioning model)
from trainer import config
from trainer.data.augment import ImageView
from trainer.data.latent_cache import to_pixels
from trainer.data.scan import crop_of, scan_dataset

pytestmark = pytest.mark.timeout(600)
PICTURES = 200  # as many as a person may drop at once; a page of the gallery holds 60


@pytest.fixture
def drop(tmp_path: Path) -> list[Path]:
    """Pictures of several kinds with captions, and a zip."""
    folder = tmp_path / "drop"
    folder.mkdir()
    files = {
        "turned.jpg": oriented("JPEG", 6),
        "clear.png": hidden_magenta(),
        "moving.gif": frames("GIF"),
        "broken.jpg": b"\xff\xd8 no",
    }
    files |= {
        f"p{seed:03}.png": encoded(photo(96, 64, seed=seed), "PNG") for seed in range(PICTURES - 10)
    }
    files["twin.png"] = files["p001.png"]
    files["wide.png"] = encoded(photo(200, 64, seed=99), "PNG")
    for name, data in files.items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text(f"pic, {name.split('.')[0]}, a red hat")
    (folder / "p000.txt").unlink()
    with zipfile.ZipFile(folder / "more.zip", "w") as archive:
        for seed in range(300, 306):
            archive.writestr(f"z{seed}.png", encoded(photo(64, 64, seed=seed), "PNG"))
            archive.writestr(f"z{seed}.txt", f"pic, z{seed}")
    return sorted(folder.iterdir())


def captions_on_disk(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}


def pictures_on_disk(folder: Path) -> set[str]:
    return {
        path.name
        for path in folder.iterdir()
        if path.suffix in (".png", ".jpg", ".gif") and ".mask" not in path.name
    }


def test_the_studio_from_drop_to_mask(open_page, server, drop: list[Path], blip: Path) -> None:  # noqa: F811
    page = open_page()
    open_dataset(page, "studio")
    page.set_input_files("#dataset-files", drop)
    page.wait_for_selector(".at-pager")
    folder = server.outputs / "datasets" / "studio"
    assert page.locator(".at-card").count() == 60, "a page of the gallery is never longer"
    assert "broken.jpg" in page.locator(".at-findings").first.inner_text()

    see_the_findings_and_cure_two(page, folder)
    change_all_captions_and_take_it_back(page, folder)
    delete_one_picture(page, folder)
    describe_by_a_model(page, folder, blip)
    move_a_crop(page, folder)
    paint_a_mask(page, folder)
    nothing_is_lost_by_a_reload(page, folder)
    download_it_all(page, server, folder)
    delete_it_and_bring_it_back(page, folder)


def see_the_findings_and_cure_two(page, folder: Path) -> None:
    page.locator(".at-fold-doctor > summary").click()
    for kind in ("duplicate", "rotated", "transparent", "animated", "no-caption"):
        assert page.locator(f".at-group[data-kind={kind}]").count() == 1, kind
    assert (
        "twin.png" not in pictures_on_disk(folder)
        or page.locator(".at-group[data-kind=duplicate]").inner_text().count(".png") >= 2
    )
    before = pictures_on_disk(folder)
    page.locator(".at-group[data-kind=duplicate]").get_by_role(
        "button", name="Leave out"
    ).first.click()
    page.locator(".at-group[data-kind=duplicate]").wait_for(state="detached")
    assert len(before - pictures_on_disk(folder)) == 1
    page.locator(".at-group[data-kind=animated]").get_by_role(
        "button", name="Save as a plain PNG"
    ).first.click()
    page.locator(".at-group[data-kind=animated]").wait_for(state="detached")
    assert (
        "moving.png" in pictures_on_disk(folder)
        and captions_on_disk(folder)["moving"] == "pic, moving, a red hat"
    )


def change_all_captions_and_take_it_back(page, folder: Path) -> None:
    before = captions_on_disk(folder)
    page.locator(".at-fold-tools > summary").click()
    page.locator("[data-panel=captions]").click()
    page.locator("#edit-find").fill(r"a (\w+) hat")
    page.locator("#edit-replace").fill(r"\1 cap")
    page.locator("#edit-pattern").check()
    page.get_by_role("button", name="Preview", exact=True).click()
    page.wait_for_selector(".at-changes dt")
    assert page.locator(".at-changes dt").first.inner_text().endswith((".png", ".jpg"))
    assert page.locator(".at-changes ins").first.inner_text().endswith("red cap")
    page.locator(".at-changes").get_by_role("button", name=re.compile("Change .* captions")).click()
    page.wait_for_function(
        "[...document.querySelectorAll('.at-card textarea')]"
        ".some((box) => box.value.endsWith('red cap'))"
    )
    after = captions_on_disk(folder)
    assert after != before and all(
        after[stem] == text.replace("a red hat", "red cap") for stem, text in before.items()
    )
    page.get_by_role("button", name=re.compile("^Undo: Changed")).click()
    page.wait_for_function(
        "[...document.querySelectorAll('.at-card textarea')]"
        ".some((box) => box.value.endsWith('a red hat'))"
    )
    assert captions_on_disk(folder) == before


def delete_one_picture(page, folder: Path) -> None:
    before = captions_on_disk(folder)
    page.locator(".at-card[data-file='p003.png'] .at-remove").click(force=True)
    page.locator(".at-card[data-file='p003.png']").wait_for(state="detached")
    assert captions_on_disk(folder) == {
        stem: text for stem, text in before.items() if stem != "p003"
    }
    assert (
        page.locator(".at-card[data-file='p004.png'] textarea").input_value()
        == "pic, p004, a red hat"
    )


def describe_by_a_model(page, folder: Path, model: Path) -> None:
    assert "p000" not in captions_on_disk(folder)
    page.locator("[data-panel=models]").click()
    page.locator("#caption-model").fill(str(model))
    page.get_by_role("button", name="Start", exact=True).click()
    page.wait_for_selector(".at-job[data-state=done]")
    assert "Done: 1 caption written" in page.locator(".at-job").inner_text()
    page.wait_for_function(
        "document.querySelector(\".at-card[data-file='p000.png'] textarea\").value !== ''"
    )
    written = captions_on_disk(folder)
    assert (
        page.locator(".at-card[data-file='p000.png'] textarea").input_value()
        == written["p000"]
        != ""
    )
    assert written["p001"] == "pic, p001, a red hat" or "p001" not in written


def find_picture(page, name: str) -> None:
    search = page.get_by_role("searchbox", name="Search names and captions")
    search.fill(name)
    page.wait_for_function(
        "[...document.querySelectorAll('.at-card')]"
        f".map((card) => card.dataset.file).join() === '{name}'"
    )
    page.locator(".at-open").click()
    page.wait_for_selector(".at-editor img")


def move_a_crop(page, folder: Path) -> None:
    find_picture(page, "wide.png")
    frame = page.locator(".at-frame")
    place = frame.bounding_box()
    page.mouse.move(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2)
    page.mouse.down()
    page.mouse.move(
        place["x"] + place["width"] / 2 + 2000, place["y"] + place["height"] / 2, steps=4
    )
    page.mouse.up()
    page.wait_for_function("/Moved the crop/.test(document.querySelector('.at-undo').innerText)")
    shown = frame.evaluate(
        "(node) => ['left', 'top', 'width', 'height']"
        ".map((side) => parseFloat(node.style[side]) / 100)"
    )
    item = next(
        item
        for item in scan_dataset(folder, config.Dataset(resolution=64, bucket_step=8))[0]
        if item.path.name == "wide.png"
    )
    settings = config.Dataset(
        resolution=64, bucket_step=8
    )  # as the built-in base's recipes have it
    assert item.crop_centre is not None and shown[0] + shown[2] == pytest.approx(1, abs=0.01), (
        "dragged to the right edge"
    )
    overlay = datasets.crop_view(item, settings)
    left, top, right, bottom = overlay["box"]
    assert [left, top, right - left, bottom - top] == pytest.approx(shown, abs=0.002)
    image = Image.open(item.path)
    box = (
        shown[0] * image.width,
        shown[1] * image.height,
        (shown[0] + shown[2]) * image.width,
        (shown[1] + shown[3]) * image.height,
    )
    box = tuple(min(max(side, 0), image.size[i % 2]) for i, side in enumerate(box))
    crop = crop_of(item, settings)
    seen = (
        np.asarray(image.resize(crop.bucket, Image.Resampling.LANCZOS, box=box), dtype=np.float32)
        / 127.5
        - 1
    )
    assert (
        np.abs(to_pixels(item.path, ImageView(crop))[0].permute(1, 2, 0).numpy() - seen).max()
        < 0.05
    ), "the overlay is the tensor"
    page.locator(".at-editor").get_by_role("button", name="Close", exact=True).click()


def paint_a_mask(page, folder: Path) -> None:
    find_picture(page, "p010.png")
    page.locator(".at-editor").get_by_role("button", name="Mask", exact=True).click()
    paper = page.locator(".at-paint")
    paper.wait_for()  # with the picture
    stroke(page, 0.02, 1 / 3)
    page.get_by_role("button", name="Save mask").click()
    page.wait_for_function("/The mask of p010/.test(document.querySelector('.at-undo').innerText)")
    mask = np.asarray(Image.open(folder / "p010.mask.png"))
    height, width = mask.shape
    assert mask[height // 2, width // 6] < 30 and mask[height // 2, -5] > 225, (
        "painted is black: not learned"
    )

    page.locator(".at-editor").get_by_role(
        "button", name="→"
    ).click()  # round to the same picture, the only one that is found
    page.locator(".at-frame").wait_for()
    page.locator(".at-editor").get_by_role("button", name="Mask", exact=True).click()
    paper.wait_for()
    stroke(page, 2 / 3, 0.75)
    page.keyboard.press("Escape")
    page.locator(".at-editor").wait_for(state="detached")
    page.wait_for_selector(".at-card .at-badge:text-is('mask')")
    mask = np.asarray(Image.open(folder / "p010.mask.png"))
    assert [int(mask[height // 2, int(width * x)] > 128) for x in (1 / 6, 0.5, 0.7, 0.95)] == [
        0,
        1,
        0,
        1,
    ], "both strokes are kept"


def stroke(page, start: float, end: float) -> None:
    """Paints across the middle of the picture, from and to a part of its width."""
    place = page.locator(".at-paint").bounding_box()
    page.mouse.move(place["x"] + place["width"] * start, place["y"] + place["height"] / 2)
    page.mouse.down()
    page.mouse.move(place["x"] + place["width"] * end, place["y"] + place["height"] / 2, steps=5)
    page.mouse.up()


def nothing_is_lost_by_a_reload(page, folder: Path) -> None:
    asked = []

    def leave(dialog) -> None:
        asked.append(dialog.type)
        wait_for(
            lambda: captions_on_disk(folder)["p010"].endswith(" typed last"),
            "the caption, while the browser asks",
        )
        dialog.accept()

    page.once("dialog", leave)
    page.locator(".at-card[data-file='p010.png'] textarea").press_sequentially(" typed last")
    page.reload()
    assert (
        asked == ["beforeunload"]
        and captions_on_disk(folder)["p010"] == "pic, p010, a red hat typed last"
    )
    page.wait_for_selector(".at-dataset[data-name=studio] .at-card")
    on_disk = captions_on_disk(folder)
    read = (
        "(cards) => cards.map((card) => [card.dataset.file, card.querySelector('textarea').value])"
    )
    shown = page.locator(".at-card").evaluate_all(read)
    assert len(shown) == 60
    for file, caption in shown:
        assert caption == on_disk.get(Path(file).stem, ""), file
    assert page.locator(".at-card[data-file='p010.png'] .at-badge").inner_text() == "mask"
    assert (
        "p003.png" not in [file for file, _ in shown]
        and "Undo" in page.locator(".at-undo").inner_text()
    )
    items = {
        item.path.name: item
        for item in scan_dataset(folder, config.Dataset(resolution=64, bucket_step=8))[0]
    }
    assert (
        items["wide.png"].crop_centre is not None
        and items["p010.png"].mask == folder / "p010.mask.png"
    )


def download_it_all(page, server, folder: Path) -> None:
    answer = page.request.get(f"{server.url}/datasetfile/studio.zip")
    with zipfile.ZipFile(io.BytesIO(answer.body())) as archive:
        assert archive.testzip() is None
        inside = {name.removeprefix("studio/"): archive.read(name) for name in archive.namelist()}
    assert inside == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def delete_it_and_bring_it_back(page, folder: Path) -> None:
    before = captions_on_disk(folder)
    for last in (False, True):
        if not page.locator("[data-panel=dataset]").is_visible():
            page.locator(".at-fold-tools > summary").click()
        page.locator("[data-panel=dataset]").click()
        page.get_by_role("button", name="Delete this dataset").click()
        page.get_by_text("The dataset studio is in the trash.").wait_for()
        assert not folder.exists()
        if not last:
            page.get_by_role("button", name="Restore").click()
            page.wait_for_selector(".at-dataset[data-name=studio] .at-card")
            assert captions_on_disk(folder) == before


def test_what_is_being_typed_outlives_a_drawing_of_the_tab(
    open_page, server, tmp_path: Path
) -> None:
    for seed in range(14):
        (tmp_path / f"p{seed:02}.png").write_bytes(encoded(photo(64, 64, seed=seed), "PNG"))
    page = open_page()
    open_dataset(page, "typed-while-drawn")
    page.set_input_files("#dataset-files", sorted(tmp_path.glob("*.png")))
    page.locator(".at-card").nth(13).wait_for()
    page.locator(".at-fold-tools > summary").click()
    page.locator("[data-panel=captions]").click()
    page.locator("#edit-find").fill("a cat")

    page.locator(".at-card .at-open").first.click()
    held, released = [], []
    page.route(
        "**/component_server/", lambda route: route.continue_() if released else held.append(route)
    )
    # Closing the image redraws the tab, but the answer comes only after the first part of the name.
    with page.expect_request("**/component_server/"):
        page.locator(".at-editor").get_by_role("button", name="Close", exact=True).click()
    search = page.get_by_role("searchbox", name="Search names and captions")
    search.evaluate("(box) => { box.isTheFirst = true; }")
    search.press_sequentially("p07")
    released.append(True)
    for route in held:
        route.continue_()
    page.wait_for_function("!document.querySelector('.at-search').isTheFirst")
    page.keyboard.type(".png")
    page.wait_for_function(
        "[...document.querySelectorAll('.at-card')]"
        ".map((card) => card.dataset.file).join() === 'p07.png'"
    )
    assert search.input_value() == "p07.png" and search.evaluate(
        "(box) => box === document.activeElement && !box.isTheFirst"
    )
    assert page.locator("#edit-find").input_value() == "a cat"


def test_a_folder_arrives_whole_in_two_windows_at_once(open_page, server, tmp_path: Path) -> None:
    for number, name in enumerate(("10_cat", "20_dog")):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "1.png").write_bytes(encoded(photo(64, 64, seed=number), "PNG"))
        (tmp_path / "set" / name / "1.txt").write_text("a photo")  # the same name and content
    pages, held = {name: open_page() for name in ("folder-first", "folder-second")}, []
    for name, page in pages.items():
        open_dataset(page, name)
    first, second = pages.values()
    second.route(
        "**/component_server/", lambda route: route.continue_() if held else held.append(route)
    )
    with second.expect_request("**/component_server/"):
        second.set_input_files("#dataset-folder", tmp_path / "set")
    first.set_input_files("#dataset-folder", tmp_path / "set")
    first.locator(".at-card").nth(1).wait_for()
    held[0].continue_()  # of files that the first window has imported meanwhile
    second.locator(".at-card").nth(1).wait_for()
    for name in pages:
        assert [
            item.caption
            for item in scan_dataset(
                server.outputs / "datasets" / name, config.Dataset(resolution=64, bucket_step=8)
            )[0]
        ] == ["a photo"] * 2

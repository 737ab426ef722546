"""The Library: find, compare, rename, tag, delete and undo; dropping a finished adapter."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from app.views import run_notes
from tests.browser import staged
from tests.browser.conftest import open_dataset, wait_for
from tests.corpus import encoded, photo
from trainer import config

DROP = """(files) => {
  const transfer = new DataTransfer();
  for (const [name, bytes] of files) transfer.items.add(new File([new Uint8Array(bytes)], name));
  const header = document.querySelector('#header');
  const how = { dataTransfer: transfer, bubbles: true, cancelable: true };
  return ['dragover', 'drop'].every((kind) => !header.dispatchEvent(new DragEvent(kind, how)));
}"""
READY = "window.atelierDrop && window.atelierOpened"


@pytest.fixture(autouse=True)
def here(server, monkeypatch) -> None:
    monkeypatch.setenv("ATELIER_OUTPUTS", str(server.outputs))


def test_find_compare_rename_delete_and_undo(open_page) -> None:
    folders = [
        staged.stage(f"shelf {name}", 100, **{"adapter.rank": rank})
        for name, rank in (("one", 4), ("two", 8), ("three", 16), ("four", 4))
    ]
    for folder in folders:
        staged.finish(folder)
    page = open_page("library")
    page.get_by_label("Search the library").fill("two shelf")
    page.wait_for_function("document.querySelectorAll('#library-view article').length === 1")
    page.get_by_label("Search the library").fill("shelf")
    page.set_viewport_size({"width": 500, "height": 300})  # the panel is above, out of sight
    for name in ("shelf two", "shelf three"):
        page.locator("article", has_text=name).get_by_role("button", name="Compare").click()
        if name == "shelf two":
            page.locator("article", has_text=name).get_by_text("Choose a second run").wait_for()
    page.wait_for_selector(".at-side tbody tr")
    assert 0 <= page.locator(".at-side h3").bounding_box()["y"] < 300
    page.set_viewport_size({"width": 1440, "height": 900})
    row = page.locator(".at-side tbody").inner_text().split()
    assert row == ["Network", "rank", "(dimension)", "8", "16"]
    assert (
        page.locator(".at-side polyline").count() == 2
        and page.locator(".at-side figure img").count() == 2
    )
    page.get_by_role("button", name="Close").click()
    page.get_by_label("Search the library").fill("nothing of it")
    page.get_by_text("No run matches “nothing of it” by name").wait_for()
    page.get_by_label("Search the library").fill("shelf")

    card = page.locator("article", has_text="shelf two")
    card.get_by_text("More", exact=True).click()
    card.get_by_label("Name of").fill("Renamed")
    card.get_by_label("Tags of").fill("best, cat")
    card.get_by_role("button", name="Save").click()
    wait_for(
        lambda: run_notes.read_notes(folders[1]) == {"name": "Renamed", "tags": ["best", "cat"]},
        "the notes",
    )
    page.get_by_label("Search the library").fill("cat")
    page.wait_for_selector("article[aria-label='Renamed'] .at-tag:text-is('best')")
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Model card").first.click()
    assert "# Renamed" in Path(waiting.value.path()).read_text()

    page.locator("article[aria-label='Renamed']").get_by_role("button", name="Delete").click()
    wait_for(lambda: not folders[1].exists(), "the deletion")
    page.get_by_role("button", name="Undo").click()
    wait_for(folders[1].is_dir, "the run's return")
    page.wait_for_selector("article[aria-label='Renamed']")


def drop(page, *files: tuple[str, bytes]) -> None:
    """Drops files on the header."""
    assert page.evaluate(DROP, [[name, list(data)] for name, data in files]), (
        "the browser would open the file in place of the page"
    )


def test_what_is_dropped_on_the_header_finds_its_place(open_page, server, tmp_path: Path) -> None:
    import numpy

    run = config.replace(
        config.RunConfig(), {"name": "from a file", "adapter.rank": 24, "dataset.trigger": "zorbit"}
    )
    file = tmp_path / "x.safetensors"
    save_file(
        {"a": numpy.zeros(3, numpy.float32)},
        file,
        metadata={"atelier_config": json.dumps(run.model_dump(mode="json"))},
    )
    page = open_page("library")
    page.wait_for_function(READY)
    drop(page, ("x.safetensors", file.read_bytes()))
    page.wait_for_selector("#said :text('trained with')")
    assert (
        page.locator("#field-name textarea, #field-name input").first.input_value() == "from a file"
    )
    assert (
        page.locator(
            "#field-dataset-trigger textarea, #field-dataset-trigger input"
        ).first.input_value()
        == "zorbit"
    )
    page.get_by_role("tab", name="Library").click()
    drop(page, ("y.json", b'{"a": 1}'))
    page.get_by_text("contains no settings of kohya_ss").wait_for()
    assert page.get_by_role("tab", name="Library").get_attribute("aria-selected") == "true", (
        "there is nothing to see on the Train tab"
    )

    first, second, third = (
        (f"{seed}.jpg", encoded(photo(64, 64, seed=seed), "JPEG")) for seed in range(3)
    )
    page.get_by_role("tab", name="Dataset").click()
    open_dataset(page, "dropped-beside")
    drop(page, first, second)
    page.locator(".at-card").nth(1).wait_for()
    page.goto(f"{server.url}/?tab=train")
    page.wait_for_function(READY)
    drop(page, third)  # the Dataset tab is not drawn yet
    page.locator(".at-dataset[data-name=dropped-beside] .at-card").nth(2).wait_for()


def test_another_file_is_made_from_an_adapter(open_page) -> None:
    """Tools: what is in the file, what each rank keeps, and a smaller file to download."""
    import numpy

    folder = staged.stage("toolbox", 100)
    staged.finish(folder)
    draw, key = (
        numpy.random.default_rng(0),
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
    )
    pair = {
        f"{key}.lora_down.weight": draw.normal(size=(4, 16)),
        f"{key}.lora_up.weight": draw.normal(size=(16, 4)),
        f"{key}.alpha": numpy.array(4.0),
    }
    about = {"ss_base_model_version": "sd_v1", "modelspec.trigger_phrase": "zorbit <img src=x>"}
    save_file(
        {name: value.astype(numpy.float32) for name, value in pair.items()},
        folder / "toolbox.safetensors",
        metadata=about,
    )
    page = open_page("library")
    card = page.locator("article", has_text="toolbox")
    card.get_by_text("Tools", exact=True).click()
    card.locator("table td", has_text="zorbit <img src=x>").wait_for()
    assert card.locator("svg polyline").count() == 2
    card.locator("select[aria-label=Rank]").select_option("2")
    card.get_by_role("button", name="Create file").click()
    link = card.get_by_role("link", name="Download toolbox-rank2.safetensors")
    link.wait_for()
    with page.expect_download() as waiting:
        link.click()
    assert load_file(waiting.value.path())[f"{key}.lora_down.weight"].shape == (2, 16)
    assert "keeps" in card.inner_text()

"""Text stays text, the page fits a phone, and at first sight there is little to choose."""

from pathlib import Path

import pytest
from PIL import Image

from app.jobs import run_actions
from tests.browser import staged
from tests.browser.conftest import open_dataset, show_tab
from trainer import config
from trainer.runs import events, run_folder

HOSTILE = (
    "<img src=x onerror=alert(1)>${alert(2)}{{alert(3)}}`$(touch PWNED)` "
    "[x](javascript:alert(4)) \"'--x"
)
TABS = ("dataset", "train", "preview", "library")
MOST_CONTROLS = {"dataset": 8, "train": 8, "preview": 10}

# A control is a visible button or labelled field. A group of radio buttons counts as one, and so
# does a slider with its number.
# A cure is there only where something needs one, and is not counted.
COUNT_CONTROLS = """() => {
  const seen = (node) => node.checkVisibility()
    && !node.closest('[role=tablist], #header, .at-grid, .at-checks');
  const blocks = new Set();
  const controls = 'input:not([type=file]), textarea, button, select, summary, a.at-button';
  const fields = '.block[id^=field-], .block[id^=preview-], .block[id=dataset]';
  for (const node of document.querySelectorAll(controls)) {
    if (seen(node)) blocks.add(node.closest(fields) || node);
  }
  return [...blocks].map((node) => node.id || node.innerText);
}"""


@pytest.fixture
def hostile_run(server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A finished run whose name, prompt, warning and failure are markup and code."""
    monkeypatch.setenv("ATELIER_OUTPUTS", str(server.outputs))
    folder = run_folder.create(config.RunConfig(name=HOSTILE[:80]))
    (folder / "samples").mkdir()
    Image.new("RGB", (64, 64), "tomato").save(folder / "samples" / "000000-0.webp")
    (folder / "a.safetensors").write_bytes(b"x")
    log = events.EventLog(folder / "events.jsonl")
    for event in (
        events.Launched(1, "1"),
        events.Started(0, 2, 3, 0, 10, HOSTILE, "fp32", HOSTILE, "x"),
        events.StepDone(1, 0.5, 1e-4, 0.1),
        events.SampleSaved(0, HOSTILE, 1, "samples/000000-0.webp"),
        events.AdapterSaved(1, "a.safetensors", 0.4),
        events.Warned(HOSTILE),
        events.Failed(HOSTILE),
    ):
        log.append(event)
    (folder / "log.txt").write_text(HOSTILE)
    yield folder.name
    run_actions.act(folder.name, "delete")


def test_hostile_text_stays_text(open_page, server, hostile_run: str, tmp_path: Path) -> None:
    picture = tmp_path / "x onerror=alert(5) ${alert(6)}.png"
    Image.new("RGB", (64, 64), "navy").save(picture)
    picture.with_suffix(".txt").write_text(HOSTILE)
    page = open_page()
    open_dataset(page, "hostile")
    page.set_input_files("#dataset-files", [picture, picture.with_suffix(".txt")])
    page.wait_for_selector(".at-card")
    caption = page.locator(".at-card textarea")
    assert caption.input_value() == HOSTILE
    caption.fill(HOSTILE + " again")
    caption.blur()
    page.wait_for_selector(".at-saved:text-is('saved')")

    for tab in ("train", "preview", "library", "train"):
        show_tab(page, tab)
    text = page.locator("#progress").inner_text()
    assert text.count(HOSTILE) >= 2 and HOSTILE[:80] in text
    page.locator("#progress .at-log summary").click()
    page.wait_for_function(
        "document.querySelector('#progress .at-log pre').textContent.includes('onerror')"
    )
    assert page.locator("#samples .at-prompt").inner_text().startswith(HOSTILE)
    assert page.locator("img[src='x']").count() == 0
    assert not list(Path.cwd().rglob("PWNED")) and not list(server.outputs.rglob("PWNED"))
    # Gradio's lists and the title show the same texts. `open_page` fails on any alert.


def test_nothing_runs_out_of_a_phone(open_page, hostile_run: str) -> None:
    page = open_page(viewport={"width": 390, "height": 844}, color_scheme="dark", has_touch=True)
    for tab in TABS:
        show_tab(page, tab)
        assert page.evaluate(
            "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        ), tab


def test_little_to_choose_at_first_sight(open_page) -> None:
    page = open_page()
    for tab, most in MOST_CONTROLS.items():
        show_tab(page, tab)
        page.evaluate(
            "document.querySelectorAll('#progress, #samples')"
            ".forEach((node) => { node.hidden = true })"
        )  # of an earlier run
        controls = page.evaluate(COUNT_CONTROLS)
        assert 1 <= len(controls) <= most, "\n".join(controls)


def test_the_keyboard_is_enough_and_the_address_follows(
    open_page, server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATELIER_OUTPUTS", str(server.outputs))
    staged.finish(staged.stage("to be previewed", 100))
    page = open_page("library")
    page.wait_for_selector("[role=tab][aria-selected=true]:has-text('Library')")
    page.wait_for_function("window.atelierOpened")
    page.keyboard.press("Alt+Digit3")
    page.wait_for_selector("[role=tab][aria-selected=true]:has-text('Preview')")
    page.wait_for_function("location.search === '?tab=preview'")
    page.reload()
    page.wait_for_selector("[role=tab][aria-selected=true]:has-text('Preview')")

    chooser = page.locator("#preview-run [role=combobox]")
    chooser.focus()
    page.wait_for_selector("#preview-run [aria-expanded=true]")
    for _ in range(2):  # what is behind it is a list too
        page.keyboard.press("Tab")
    page.wait_for_function("document.activeElement.closest('#preview-prompt')")
    assert page.locator("[aria-expanded=true]").count() == 0, (
        "a list that was left lies over what comes next"
    )
    focused = "document.activeElement.closest('label') || document.activeElement"
    seen = f"getComputedStyle({focused}).outlineStyle"
    page.locator("#preview-strength input[type=range]").focus()
    assert page.evaluate(seen) == "solid"
    page.get_by_role("tab", name="Train").press("Enter")
    page.locator("#field-base input:checked").focus()
    assert page.evaluate(seen) == "solid"

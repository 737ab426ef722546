"""Takes the screenshots in `docs/images/`: `python docs/screenshots.py`.

Shows every tab empty, busy, failed and finished, in light, dark and at phone width. Trains a real
adapter for a minute or two. Needs chromium and playwright, like the browser tests.
"""

import os
import sys
import tempfile
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from app.jobs import run_actions
from tests.browser.conftest import ARGUMENTS, CHROMIUM, Server
from trainer import config

IMAGES = Path(__file__).resolve().parent / "images"
DESKTOP, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
MAX_BYTES = 120_000
QUALITY = 82
TABS = ("dataset", "train", "preview", "library")
TIMEOUT = 900_000  # milliseconds
STEPS = 400

# The trainer shares the cores with the browser, so more threads would mostly wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        server = Server(Path(folder) / "outputs").start()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            take_all(browser, server)
        finally:
            browser.close()
            server.stop()


def take_all(browser: Browser, server: Server) -> None:
    page = open_page(browser, server)
    for tab in TABS:
        show(page, tab)
        save(page, f"{tab}-empty")
    show(page, "dataset")
    page.get_by_role("button", name="A subject").click()
    page.wait_for_function("document.querySelectorAll('.at-card').length === 12")
    first_images = "[...document.querySelectorAll('.at-card img')].slice(0, 8)"
    page.wait_for_function(f"{first_images}.every((image) => image.complete)")
    save_all_styles(browser, server, page, "dataset", "dataset")

    start_training(page)
    page.wait_for_function(
        "document.querySelectorAll('#samples figure').length >= 6", timeout=TIMEOUT
    )
    page.wait_for_function("document.querySelector('#progress .at-pill').innerText === 'Training'")
    save_all_styles(browser, server, page, "train", "train", "#progress")
    page.wait_for_function(
        "document.querySelector('#progress .at-pill').innerText === 'Finished'", timeout=TIMEOUT
    )
    page.wait_for_timeout(1500)
    save(page, "train-finished")
    take_advanced(page)
    take_preview(browser, server, page)
    show(page, "library")
    page.wait_for_selector(".at-run img")
    fail_a_run(server)
    page.wait_for_selector(".at-run .at-bad")
    save_all_styles(browser, server, page, "library", "library")
    show(page, "train")
    save(page, "train-failed")


def take_advanced(page: Page) -> None:
    page.locator("#advanced > button").click()
    page.fill("#advanced-search", "rank")
    page.wait_for_selector("#field-adapter-rank input")
    page.locator("#field-adapter-rank input").first.fill("32")
    page.wait_for_selector(".at-chip")
    page.locator("#advanced").scroll_into_view_if_needed()
    page.wait_for_timeout(500)
    save(page, "train-advanced", top=False)


def take_preview(browser: Browser, server: Server, page: Page) -> None:
    page.locator("#progress").get_by_role("button", name="Preview").click()
    page.wait_for_function("document.querySelector('#preview-prompt textarea')?.value")
    page.locator("#compare").click()
    page.wait_for_selector("#preview-view .at-compare")
    save_all_styles(browser, server, page, "preview", "preview")
    page.locator("#grid-strengths").click()
    page.wait_for_function("document.querySelectorAll('#preview-view img').length === 5")
    page.wait_for_selector("#preview-view .at-busy", state="detached")
    page.wait_for_timeout(800)
    save(page, "preview-grid")


def fail_a_run(server: Server) -> None:
    """Starts a run whose base is missing, as if its disk was unplugged."""
    os.environ["ATELIER_OUTPUTS"] = str(server.outputs)
    dataset = config.Dataset(folder=str(server.outputs / "datasets" / "example-subject"))
    run_actions.start(
        config.RunConfig(
            name="went wrong", base=config.Base(model="/media/models/gone"), dataset=dataset
        )
    )


def save_all_styles(
    browser: Browser, server: Server, page: Page, tab: str, name: str, phone_at: str = ""
) -> None:
    """Takes a screenshot in light, in dark, and at phone width."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(800)
        save(page, f"{name}-{scheme}")
    page.emulate_media(color_scheme="light")
    phone = open_page(browser, server, tab, viewport=PHONE, device_scale_factor=2)
    phone.wait_for_timeout(2500)
    if phone_at:
        phone.evaluate("(selector) => document.querySelector(selector).scrollIntoView()", phone_at)
        phone.wait_for_timeout(500)
    save(phone, f"{name}-phone", top=not phone_at)
    phone.context.close()


def show(page: Page, tab: str) -> None:
    page.get_by_role("tab", name=tab.capitalize()).click()
    page.wait_for_timeout(1800)


def open_page(browser: Browser, server: Server, tab: str = "dataset", **look) -> Page:
    page = browser.new_context(**{"viewport": DESKTOP, **look}).new_page()
    page.set_default_timeout(TIMEOUT)
    page.goto(f"{server.url}/?tab={tab}")
    page.wait_for_selector("#header h1")
    return page


def start_training(page: Page) -> None:
    page.get_by_role("button", name="Go to training").first.click()
    page.wait_for_selector("#start-training", state="visible")
    page.locator("#field-sampling-prompts textarea").fill(
        "a zorbit on a white background\na zorbit on a green background"
    )
    page.locator("#advanced > button").click()
    page.locator("#section-training > button").click()
    page.locator("#field-training-steps input").fill(str(STEPS))
    page.wait_for_function(
        f"document.querySelector('#estimate').innerText.includes('= {STEPS} steps')"
    )
    page.locator("#advanced > button").click()
    page.locator("#start-training").click()


def save(page: Page, name: str, top: bool = True) -> None:
    path = IMAGES / f"{name}.webp"
    if top:
        page.evaluate("window.scrollTo(0, 0)")
    with Image.open(BytesIO(page.screenshot())) as image:
        image.convert("RGB").save(path, quality=QUALITY, method=6)
    assert path.stat().st_size <= MAX_BYTES, f"{name} is {path.stat().st_size} bytes"
    print(path)


if __name__ == "__main__":
    main()

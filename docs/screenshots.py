"""Takes the pictures of the page in `docs/images/`: `python docs/screenshots.py`. Trains a real adapter for a minute or two.

Needs chromium and playwright, as the browser tests do, and leaves nothing but the pictures.
"""

import os
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.browser.conftest import ARGUMENTS, CHROMIUM, Server

IMAGES = Path(__file__).resolve().parent / "images"
DESKTOP, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
MAX_BYTES = 250_000
PATIENCE = 900_000  # milliseconds
STEPS = 400

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of a trainer that shares its cores wait for each other more than they work


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
    page.get_by_role("button", name="A subject").click()
    page.wait_for_function("document.querySelectorAll('.at-card').length === 12")
    page.wait_for_function("[...document.querySelectorAll('.at-card img')].slice(0, 8).every((image) => image.complete)")
    save(page, "dataset")

    start_training(page)
    page.wait_for_function("document.querySelectorAll('#samples figure').length >= 6", timeout=PATIENCE)
    page.wait_for_function("document.querySelector('#progress .at-pill').innerText === 'Training'")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(800)
        save(page, f"train-{scheme}")
    phone = open_page(browser, server, "train", viewport=PHONE, device_scale_factor=2)
    phone.locator("#progress").scroll_into_view_if_needed()
    phone.evaluate("document.querySelector('#progress').scrollIntoView()")
    phone.wait_for_timeout(1500)
    save(phone, "train-phone")

    page.wait_for_function("document.querySelector('#progress .at-pill').innerText === 'Finished'", timeout=PATIENCE)
    page.locator("#progress").get_by_role("button", name="Preview").click()
    page.locator("#compare").click()
    wait_for_pictures(page, 2)
    page.locator("#grid-strengths").click()
    wait_for_pictures(page, 5)
    save(page, "preview-dark")
    page.emulate_media(color_scheme="light")
    page.locator("#compare").click()
    wait_for_pictures(page, 2)
    save(page, "preview")
    page.get_by_role("tab", name="Library").click()
    page.wait_for_selector(".at-run img")
    save(page, "library")


def open_page(browser: Browser, server: Server, tab: str = "dataset", **look) -> Page:
    page = browser.new_context(**{"viewport": DESKTOP, **look}).new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(f"{server.url}/?tab={tab}")
    page.wait_for_selector("#header h1")
    return page


def start_training(page: Page) -> None:
    page.get_by_role("button", name="Go to training").first.click()
    page.wait_for_selector("#start-training", state="visible")
    page.locator("#field-sampling-prompts textarea").fill("a zorbit on a white background\na zorbit on a green background")
    page.locator("#advanced > button").click()
    page.locator("#section-training > button").click()
    page.locator("#field-training-steps input").fill(str(STEPS))
    page.wait_for_function(f"document.querySelector('#estimate').innerText.includes('= {STEPS} steps')")
    page.locator("#advanced > button").click()
    page.locator("#start-training").click()


def wait_for_pictures(page: Page, count: int) -> None:
    page.wait_for_function(f"""() => {{ const view = document.querySelector('#preview-view');
        return view.querySelectorAll('img').length === {count} && !view.querySelector('.at-busy') }}""")
    page.wait_for_timeout(800)


def save(page: Page, name: str) -> None:
    path = IMAGES / f"{name}.png"
    if name != "train-phone":
        page.evaluate("window.scrollTo(0, 0)")
    page.screenshot(path=path)
    with Image.open(path) as image:
        image.convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size <= MAX_BYTES, f"{name} is {path.stat().st_size} bytes"
    print(path)


if __name__ == "__main__":
    main()

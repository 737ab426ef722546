"""A real page server in a process of its own, and a real browser in front of it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.browser import staged

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
PATIENCE = float(
    os.environ.get("TEST_PATIENCE", "240")
)  # seconds; the machine may be training meanwhile


def wait_for(condition: Callable[[], object], what: str, patience: float = PATIENCE) -> object:
    """The condition's value once it is true."""
    end = time.monotonic() + patience
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {patience} s for {what}"
        time.sleep(0.1)
    return value


class Server:
    """`python -m app` over an outputs folder."""

    def __init__(self, outputs: Path, *options: str):
        self.outputs = outputs
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.options = options
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = outputs.parent / f"server-{self.port}.log"

    def start(self) -> "Server":
        environment = {
            **os.environ,
            "ATELIER_OUTPUTS": str(self.outputs),
            "HF_HUB_OFFLINE": "1",
            "PYTHONUTF8": "1",
        }
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "app",
                    "--no-browser",
                    "--port",
                    str(self.port),
                    *self.options,
                ],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        wait_for(self._answers, "the server")
        return self

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        with socket.socket() as probe:
            probe.settimeout(1)
            return (
                probe.connect_ex(("127.0.0.1", self.port)) == 0
                and b" is at " in self.log.read_bytes()
            )

    def stop(self, how: int = signal.SIGTERM) -> None:
        self.process.send_signal(how)
        self.process.wait(30)


def open_dataset(page, name: str) -> None:
    """Begins a dataset, of a name that no other test has: all share a server."""
    page.wait_for_selector(".at-dataset[data-name]")
    page.locator("#dataset input").fill(name)
    page.keyboard.press("Enter")
    page.wait_for_selector(f".at-dataset[data-name={name}]")


DRAWN = {
    "dataset": ".at-dataset",
    "train": "#progress .atelier > *",
    "preview": "#preview-view .atelier > *",
    "library": "#library-view .atelier > *",
}
"""What each tab contains once its main view is drawn."""

# Two equal looks with a frame between them, and no transition under way. An endless animation, such
# as the one of a busy pill, never ends.
STILL = """async () => {
  const frame = () => new Promise((resolve) => requestAnimationFrame(resolve));
  const look = () => [...document.querySelectorAll('.gradio-container *')]
    .filter((node) => node.checkVisibility())
    .map((node) => {
      const { color, backgroundColor, opacity } = getComputedStyle(node);
      return [node.localName, color, backgroundColor, opacity].join();
    })
    .join();
  await frame();
  await frame();
  const before = look();
  await frame();
  await frame();
  const moving = document.getAnimations().some(
    ({ playState, effect }) =>
      playState === 'running' && effect.getComputedTiming().endTime !== Infinity);
  return !moving && look() === before;
}"""


def show_tab(page, tab: str) -> None:
    """Opens a tab and waits until it is drawn and no transition is under way."""
    page.locator(f"#tabs [role=tab]:has-text('{tab.capitalize()}')").first.click()
    page.wait_for_selector(f"#tabs [role=tab][aria-selected=true]:has-text('{tab.capitalize()}')")
    page.wait_for_selector(DRAWN[tab])
    page.wait_for_function(STILL)


def show_in_colours(page, scheme: str) -> None:
    """Changes between light and dark, and waits until all colours have changed."""
    page.emulate_media(color_scheme=scheme)
    page.wait_for_function(
        "(isDark) => document.body.classList.contains('dark') === isDark", arg=scheme == "dark"
    )
    page.wait_for_function(STILL)


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    if CHROMIUM is None:
        pytest.skip("The browser tests need Chromium (Debian: apt-get install chromium).")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all browser tests; each makes datasets and runs of its own name."""
    running = Server(tmp_path_factory.mktemp("page") / "outputs").start()
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def _no_staged_runs_left() -> Iterator[None]:
    yield
    while staged.made:
        shutil.rmtree(staged.made.pop(), ignore_errors=True)


@pytest.fixture
def open_page(browser, server: Server) -> Iterator[Callable[..., object]]:
    """Opens the page in a new browser context.

    Afterwards checks that no other host was contacted and that the console has no errors.
    """
    contexts, troubles = [], []

    def open_one(tab: str = "", **look) -> object:
        context = browser.new_context(
            **{"viewport": {"width": 1440, "height": 900}, "accept_downloads": True, **look}
        )
        context.set_default_timeout(PATIENCE * 1000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
        page.on(
            "console",
            lambda message: (
                troubles.append(f"console: {message.text}") if message.type == "error" else None
            ),
        )
        page.on(
            "dialog",
            lambda dialog: (
                (troubles.append(f"dialog: {dialog.message}"), dialog.dismiss())
                if dialog.type == "alert"
                else None
            ),
        )
        page.on(
            "request",
            lambda request: (
                troubles.append(f"outside: {request.url}")
                if not request.url.startswith((server.url, "data:", "blob:"))
                else None
            ),
        )
        page.goto(server.url + (f"/?tab={tab}" if tab else ""))
        page.wait_for_selector("#header h1")
        return page

    yield open_one
    for context in contexts:
        context.close()
    # Servers that a test kills and streams that a reload ends are not faults of the page.
    assert not [
        trouble
        for trouble in troubles
        if not any(word in trouble for word in ("ERR_", "Connection", "AbortError"))
    ]

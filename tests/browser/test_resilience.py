"""Reloads, second windows, killed trainers and killed servers do not change what is shown."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from app.jobs import queue, run_actions, trainer_process
from tests.browser import staged
from tests.browser.conftest import open_dataset, wait_for
from trainer import config
from trainer.models.model_files import EMBEDDED_FOLDER
from trainer.runs import events, run_lock, run_requests, run_status

EXAMPLES = EMBEDDED_FOLDER.parent / "examples"
STATE = "document.querySelector('#progress .at-pill')?.innerText"


@pytest.fixture
def long_run(
    server, tiny_base: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Puts a run of many short steps into the server's queue."""
    monkeypatch.setenv("ATELIER_OUTPUTS", str(server.outputs))
    started = []

    def start(name: str, **changes) -> Path:
        settings = {
            "name": name,
            "base.model": str(tiny_base),
            "dataset.folder": str(tiny_dataset),
            "dataset.resolution": 32,
            "dataset.bucket_step": 8,
            "training.steps": 100_000,
            "adapter.rank": 2,
            "saving.saves": 1,
            "saving.state_every": 2,
            "sampling.inference_steps": 1,
            "sampling.prompts": ["picture number 0"],
        }
        folder = (
            server.outputs
            / "runs"
            / run_actions.start(config.replace(config.RunConfig(), settings | changes))
        )
        started.append(folder)
        return folder

    yield start
    for folder in started:
        run_requests.withdraw(folder, "queued")
        if run_lock.is_alive(folder):
            os.kill(trainer_of(folder), signal.SIGKILL)
            wait_for(lambda folder=folder: not run_lock.is_alive(folder), "the trainer's end")


def trainer_of(folder: Path) -> int:
    return [
        event.pid
        for event in events.read_events(folder / "events.jsonl")
        if isinstance(event, events.Launched)
    ][-1]


def wait_for_state(page, state: str) -> None:
    page.wait_for_function(f"{STATE} === '{state}'")


def step_shown(page) -> int:
    return int(page.locator("#progress .at-figures b").first.inner_text().split("/")[0])


def test_reload_second_window_kill_and_resume(open_page, server, long_run) -> None:
    folder = long_run("survivor")
    page = open_page("train")
    wait_for_state(page, "Training")
    wait_for(lambda: run_status.read_status(folder).step >= 6, "some steps")

    page.reload()
    wait_for_state(page, "Training")
    second = open_page("train")
    wait_for_state(second, "Training")
    assert page.get_by_role("tab", name="Train").get_attribute("aria-selected") == "true"
    assert (
        page.locator("#progress .at-name").inner_text()
        == second.locator("#progress .at-name").inner_text()
        == "survivor"
    )

    waiting = long_run("second in line")
    for window in (
        page,
        second,
    ):  # a window that does not show the queue yet would seem to have lost it
        window.wait_for_selector("#progress .at-queue >> text=second in line")
    page.get_by_role("button", name="Remove").click()
    second.wait_for_selector(".at-queue", state="detached")
    assert not run_requests.requested(waiting, "queued")

    os.kill(trainer_of(folder), signal.SIGKILL)
    wait_for_state(page, "Interrupted")
    wait_for_state(second, "Interrupted")
    assert "killed" in page.locator("#progress .at-notice.at-bad").first.inner_text()
    before = run_status.read_status(folder).step

    page.get_by_role("button", name="Resume").click()
    wait_for_state(second, "Training")
    wait_for(lambda: run_status.read_status(folder).step > before, "steps after the last")

    page.get_by_role("button", name="Pause").click()
    wait_for_state(second, "Paused")
    second.get_by_role("button", name="Continue").click()
    wait_for_state(page, "Training")

    second.get_by_role("button", name="Stop and save").click()
    wait_for_state(page, "Stopped")
    page.wait_for_selector("#progress a[download]")
    assert page.get_by_role("button", name="Resume").is_visible()


def test_the_server_may_die(open_page, server, long_run) -> None:
    folder = long_run("outlives the page")
    page = open_page("train")
    wait_for_state(page, "Training")
    pid = trainer_of(folder)

    server.stop(signal.SIGKILL)
    step = run_status.read_status(folder).step
    wait_for(lambda: run_status.read_status(folder).step > step, "steps without a page")
    server.start()

    page.goto(f"{server.url}/?tab=train")
    wait_for_state(page, "Training")
    assert trainer_of(folder) == pid, "the new server must not start a second trainer"
    page.get_by_role("button", name="Stop and save").click()
    wait_for_state(page, "Stopped")


def test_a_failure_is_said_and_nothing_is_lost(open_page, server, long_run) -> None:
    long_run("fails", **{"base.model": str(server.outputs / "no-such-model")})
    page = open_page("train")
    page.locator("#field-dataset-trigger input, #field-dataset-trigger textarea").first.fill("kept")
    wait_for_state(page, "Failed")
    assert "no-such-model" in page.locator("#progress .at-notice.at-bad").first.inner_text()
    assert (
        page.locator(
            "#field-dataset-trigger input, #field-dataset-trigger textarea"
        ).first.input_value()
        == "kept"
    )
    assert (
        page.get_by_role("button", name="Resume").is_visible()
        and page.locator("#start-training").is_enabled()
    )


def test_a_trainer_that_cannot_begin_is_not_started_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATELIER_OUTPUTS", str(tmp_path))
    folder = tmp_path / "runs" / run_actions.start(config.RunConfig(name="never"))
    monkeypatch.setattr(trainer_process, "TRAINER", "no_such_module")
    launcher = queue.Launcher()
    launcher.check()
    launcher.executor.process.wait(60)
    launcher.check()
    status = run_status.read_status(folder)
    assert status.state == "failed" and "no_such_module" in status.message
    assert launcher.executor.process is None and not run_requests.requested(folder, "queued")


def test_a_new_name_may_be_the_beginning_of_another(open_page, server) -> None:
    """Enter takes what was typed; a name is chosen from the list with the arrow keys."""
    (server.outputs / "datasets" / "longer-name").mkdir(parents=True)
    page = open_page()
    open_dataset(page, "longer")
    field = page.locator("#dataset input")
    field.fill("longer-n")
    page.wait_for_selector("#dataset [role=option]:has-text('longer-name')")
    field.press("ArrowDown")
    field.press("Enter")
    page.wait_for_selector(".at-dataset[data-name=longer-name]")


def test_a_caption_is_typed_on_while_the_tab_is_drawn_anew(open_page, server) -> None:
    first, second, third = sorted((EXAMPLES / "photos").glob("*.jpg"))[:3]
    page = open_page()
    open_dataset(page, "slowly-typed")
    page.set_input_files("#dataset-files", [first])
    page.wait_for_function("document.querySelectorAll('.at-card').length === 1")
    words = "a photograph, described slowly and with many words while more pictures arrive"
    page.locator(".at-card textarea").focus()
    page.set_input_files("#dataset-files", [second])
    page.keyboard.type(words, delay=80)
    page.wait_for_function("document.querySelectorAll('.at-card').length === 2")
    box = page.locator(f".at-card[data-file='{first.name}'] textarea")
    assert box.input_value() == words
    caption = server.outputs / "datasets" / "slowly-typed" / first.with_suffix(".txt").name
    wait_for(
        lambda: caption.exists() and caption.read_text().strip() == words, "the caption on the disk"
    )
    page.wait_for_function(
        "document.activeElement.closest('.at-card')"
        ".querySelector('.at-saved').innerText === 'saved'"
    )
    page.wait_for_function("!document.activeElement.unsaved")
    caption.write_text(
        "by a model"
    )  # while the cursor stands in the box, and nothing is being typed
    page.set_input_files("#dataset-files", [third])
    page.wait_for_function("document.querySelectorAll('.at-card').length === 3")
    page.wait_for_function("document.activeElement.value === 'by a model'")
    # The box has nothing to save, so it cannot write the old caption back.
    assert not page.evaluate("document.activeElement.unsaved || document.activeElement.edited()")
    assert caption.read_text().strip() == "by a model"


def test_the_preview_goes_on_to_the_newest_save(
    open_page, server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It chose the first save when that came; what is downloaded later is what is shown then."""
    monkeypatch.setenv("ATELIER_OUTPUTS", str(server.outputs))
    folder = staged.stage("followed", 20)
    with staged.at_work(folder):
        page = open_page("preview")
        page.wait_for_function(
            "document.querySelector('#preview-save input')?.value.startsWith('Step 20')"
        )
        staged.finish(folder)
        page.wait_for_function(
            "document.querySelector('#preview-save input').value.startsWith('Finished file')"
        )


def test_a_finished_run_with_a_gauge_is_drawn_when_its_tab_is_first_opened(
    open_page, server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data arrives before the tab is drawn, and the view is drawn at once."""
    monkeypatch.setenv("ATELIER_OUTPUTS", str(server.outputs))
    folder = staged.stage("gauged", 100)
    for step, loss in ((90, 0.2), (100, 0.1)):
        events.EventLog(folder / "events.jsonl").append(
            events.Validated(step, loss, [loss, loss], loss / 2)
        )
    # The header is on every tab and is drawn from the same answer as the view of the run.
    with staged.at_work(folder):
        page = open_page()
        page.wait_for_function("document.title.startsWith('Training')")
        staged.finish(folder)
    page.wait_for_function("document.title === 'gauged is finished'")
    page.get_by_role("tab", name="Train").click()
    page.wait_for_selector("#progress .at-panel :text-is('ready')")

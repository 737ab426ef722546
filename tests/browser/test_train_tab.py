"""The Train tab before, during and after a run. Nothing is trained here."""

import os
from pathlib import Path

import pytest

from app.actions import dataset_folders, datasets
from app.jobs import run_actions
from tests.browser import staged
from tests.browser.conftest import wait_for
from trainer import config
from trainer.runs import run_requests
from trainer.runs.events import StepDone

KOHYA = (
    '{"network_dim": 24, "network_alpha": 12, "learning_rate": 0.0001, '
    '"unet_lr": 0.0002, "color_aug": true}'
)


@pytest.fixture(autouse=True)
def here(server, monkeypatch) -> None:
    monkeypatch.setenv("ATELIER_OUTPUTS", str(server.outputs))


def test_three_clicks_from_pictures_to_training(open_page, server) -> None:
    """Example, Go to training, Start. The launcher is kept busy, so that nothing is trained."""
    with staged.at_work(staged.stage("keeps the device", 3)):
        page = open_page()
        page.wait_for_selector(".at-dataset[data-name]")
        page.locator("#dataset input").fill("as on the first day")  # other tests have left datasets
        page.keyboard.press("Enter")
        page.wait_for_selector(".at-drop.at-roomy")
        clicks = ["A style", "Go to training", "Start training"]
        for text in clicks:
            page.get_by_role("button", name=text, exact=True).first.click()
            if text == "Go to training":
                page.wait_for_function(
                    "document.querySelector('#estimate')?.innerText.includes(' steps in ')"
                )
        folder = wait_for(
            lambda: next((f for f in run_requests.queue() if "example-style" in f.name), None),
            "the run in the queue",
        )
        assert len(clicks) == 3 and config.load(folder / "run.toml").dataset.folder.endswith(
            "example-style"
        )
        page.wait_for_selector("#estimate :text('is queued until')")
        run_requests.withdraw(folder, "queued")


def test_advanced_is_searched_marked_and_reset(open_page, server, tmp_path: Path) -> None:
    datasets.add_example("subject")
    page = open_page("train")
    page.wait_for_function("document.querySelector('#estimate')?.innerText.includes(' steps in ')")
    page.locator("#advanced > button").click()
    page.fill("#advanced-search", "rank")
    page.wait_for_selector("#field-adapter-rank input")
    assert (
        page.locator("#section-saving").is_hidden()
        and page.locator("#section-adapter").is_visible()
    )
    page.locator("#field-adapter-rank input").first.fill("32")
    page.wait_for_selector(".at-chip:has-text('Network rank (dimension) 32')")
    assert "inset" in page.locator("#field-adapter-rank").evaluate(
        "node => getComputedStyle(node).boxShadow"
    )
    page.locator(".at-chip").click()
    page.wait_for_selector(".at-chip", state="detached")
    assert page.locator("#field-adapter-rank input").first.input_value() == "8"

    page.locator("#field-adapter-rank input").first.fill("0")
    page.wait_for_selector(".at-check.at-bad:has-text('Rank')")
    page.get_by_role("button", name="Reset it").click()
    page.wait_for_selector(".at-check.at-bad", state="detached")

    settings = tmp_path / "kohya.json"
    settings.write_text(KOHYA)
    page.set_input_files("#settings-file", settings)
    page.wait_for_selector("#advanced-tools :text('color_aug')")
    assert page.locator("#field-adapter-rank input").first.input_value() == "24"
    page.locator("#advanced-tools summary").click()
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Export as TOML").click()
    assert config.load(Path(waiting.value.path())).adapter.rank == 24
    page.get_by_label("Preset name").fill("My faces")
    page.get_by_role("button", name="Save as preset").click()
    page.wait_for_selector("#field-preset label:has-text('My faces')")


def test_of_two_recipes_chosen_quickly_the_second_fills_the_form(open_page) -> None:
    datasets.add_example("subject")
    page = open_page("train")
    text = "document.querySelector('#estimate')?.innerText"
    page.wait_for_function(f"{text}.includes(' 100 views ')")
    network = page.context.new_cdp_session(page)
    network.send("Network.enable")
    network.send(
        "Network.emulateNetworkConditions",
        {"offline": False, "latency": 500, "downloadThroughput": -1, "uploadThroughput": -1},
    )
    # The second choice is made after the request of the first was sent, and before its answer.
    with page.expect_request(lambda request: "/queue/join" in request.url):
        page.locator("#field-preset input[value=embedded-object]").check()
    page.locator("#field-preset input[value=embedded-style]").check()
    page.wait_for_function(f"{text}.includes(' 110 views ')")


def test_a_dataset_that_gets_another_name_is_not_chosen_any_more(open_page) -> None:
    name = dataset_folders.duplicate(datasets.add_example("subject"))
    os.utime(datasets.resolve(name))  # the one worked on last is chosen at first
    page = open_page("train")
    page.wait_for_function(
        f"document.querySelector('#field-dataset-folder input')?.value == '{name}'"
    )
    page.wait_for_function("document.querySelector('#estimate')?.innerText.includes(' steps in ')")
    dataset_folders.remove(dataset_folders.rename(name, "vanished"))
    page.wait_for_function("document.querySelector('#field-dataset-folder input').value == ''")
    page.wait_for_function("!document.querySelector('#estimate')?.innerText.includes(' steps in ')")
    page.get_by_role("button", name="Start training").click()
    page.wait_for_selector("#estimate .at-bad")
    assert page.locator(".toast-body").count() == 0


def test_while_it_runs(open_page, server) -> None:
    folder = staged.stage("at work", 40)
    with staged.at_work(folder) as log:
        waiting = [
            server.outputs / "runs" / run_actions.start(config.RunConfig(name=name))
            for name in ("one", "two")
        ]
        page = open_page("train")
        page.wait_for_function("document.title.startsWith('Training 40 %')")
        text = page.locator("#progress .at-figures").inner_text()
        for words in (
            "40 / 100",
            "steps",
            "left",
            "images/s",
            "validation",
            "learning rate",
            "memory",
            "in use",
        ):
            assert words in text, words
        assert (
            page.locator("#curve .at-rate").count() == 1
            and page.locator("#curve .at-valid-dot").count() == 3
        )
        for button, what in (("Save now", "save"), ("Sample now", "sample"), ("Pause", "pause")):
            page.get_by_role("button", name=button).click()
            wait_for(lambda what=what: what in staged.requests(folder), button)
        run_requests.withdraw(folder, "pause")
        page.get_by_role("button", name="Pause").hover()
        page.mouse.down()
        log.append(StepDone(41, 0.1, 1e-4, 0.25))
        page.wait_for_function("document.title.startsWith('Training 41 %')")
        page.mouse.up()
        wait_for(
            lambda: "pause" in staged.requests(folder), "a press during which another step came"
        )
        run_requests.withdraw(folder, "pause")
        page.wait_for_function(
            "document.querySelector('#progress .at-figures').innerText.includes('41 / 100')"
        )

        divider = page.get_by_label("Divider between Base and ★ Step 40")
        divider.focus()
        page.keyboard.press("Home")
        assert (
            page.locator(".at-compare").evaluate("node => node.style.getPropertyValue('--at-at')")
            == "0%"
        )
        log.append(StepDone(42, 0.1, 1e-4, 0.25))
        page.wait_for_function(
            "document.querySelector('#progress .at-figures').innerText.includes('42 / 100')"
        )
        assert (
            page.locator(".at-compare").evaluate("node => node.style.getPropertyValue('--at-at')")
            == "0%"
        ), "it stays where it was left"
        page.get_by_label("Show Step 20").click()
        page.wait_for_selector(".at-compare .at-right:text-is('Step 20')")

        page.get_by_role("button", name="Move two up").click()
        wait_for(lambda: list(run_requests.queue()) == waiting[::-1], "the other order")
        for place in (1, 0):
            page.get_by_role("button", name="Remove").first.click()
            page.wait_for_function(f"document.querySelectorAll('.at-queue li').length === {place}")
            wait_for(lambda place=place: len(run_requests.queue()) == place, "an emptier queue")
        staged.finish(folder)
    page.wait_for_function("document.title === 'at work is finished'")
    page.wait_for_selector("#progress a[download]")
    assert page.get_by_role("button", name="Run again").is_visible()


def test_run_again_takes_the_same_settings(server) -> None:
    folder = staged.stage("once more", 100)
    staged.finish(folder)
    with staged.at_work(staged.stage("keeps the device", 1)):
        run_actions.act(folder.name, "repeat")
        again = run_requests.queue()[-1]
        assert again != folder and config.load(again / "run.toml") == config.load(
            folder / "run.toml"
        )
        run_actions.act(again.name, "unqueue")
        run_actions.act(again.name, "delete")

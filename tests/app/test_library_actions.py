"""The Library: names, tags, delete and restore, comparison, model card, and upload to the Hub."""

from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HFValidationError

from app.actions import library, publishing
from app.jobs import runs
from app.page.html_view import with_messages
from app.tabs import library as library_tab
from app.tabs import preview_plans
from app.views import files, run_cards, run_notes
from tests.browser import staged
from trainer.errors import TrainerError
from trainer.runs import events, run_folder, run_requests


@pytest.fixture
def finished(outputs):
    folder = staged.stage("maya", 100, **{"base.model": "someone/model"})
    staged.finish(folder)
    runs.all_runs.forget()
    return folder


def test_a_run_is_renamed_and_tagged(finished) -> None:
    library.describe(finished.name, "  Maya,  the cat ", ["cat", " cat ", "", "x" * 99])
    assert run_notes.read_notes(finished) == {"name": "Maya, the cat", "tags": ["cat", "x" * 30]}
    assert run_notes.name_of(finished) == "Maya, the cat"
    card = run_cards.library_view()["cards"][0]
    assert card["given"] == "Maya, the cat"
    assert card["trigger"] == "zorbit"
    assert card["base"] == "someone/model"
    (finished / run_notes.FILE).write_text("[]")
    assert run_notes.name_of(finished) == "maya"


def test_a_deleted_run_is_restored_completely(finished) -> None:
    before = {path.name for path in finished.iterdir()}
    library.delete(finished.name)
    assert not finished.exists()
    compare = with_messages(library_tab.compare)
    assert "error" in compare({"first": finished.name, "second": finished.name})
    library.restore(finished.name)
    assert {path.name for path in finished.iterdir()} == before
    for wrong in ("../maya", "", None, "nothing"):
        with pytest.raises(TrainerError):
            library.restore(wrong)
    with staged.at_work(finished), pytest.raises(TrainerError, match="stop it first"):
        run_requests.request(finished, "pause")
        (finished / "events.jsonl").write_text(
            "\n".join((finished / "events.jsonl").read_text().splitlines()[:-1]) + "\n"
        )
        library.delete(finished.name)


def test_two_deleted_runs_with_the_same_name_are_both_kept(finished) -> None:
    name, content = finished.name, (finished / "run.toml").read_bytes()
    for mark in ("first", "second"):
        finished.mkdir(exist_ok=True)
        (finished / "run.toml").write_bytes(content)
        (finished / mark).touch()
        library.delete(name)
    assert {
        path.name
        for path in library.removed_folder().glob("*/*")
        if path.name in ("first", "second")
    } == {"first", "second"}
    library.restore(name)
    assert (finished / "second").exists()


def test_the_curves_of_only_one_of_hundreds_of_runs_are_read_again(finished, monkeypatch) -> None:
    for number in range(300):
        log = events.EventLog(run_folder.create(runs.settings(finished)) / "events.jsonl")
        log.append(events.Launched(pid=1, version="", boot=""))
        log.append(events.StepDone(number, 0.1, 1e-4, 0.25))
        log.append(events.AdapterSaved(number, "x.safetensors", 0.1))
    runs.all_runs.forget()
    assert len(run_cards.library_view()["cards"]) == 301
    parsed, parse = [], events.parse_event
    monkeypatch.setattr(events, "parse_event", lambda line: parsed.append(line) or parse(line))
    for _ in range(2):
        runs.latest.forget()
        preview_plans.file_choices.forget()
        preview_plans.file_choices()
        assert runs.status(runs.shown()).step == 299
    assert sum(b"StepDone" in line for line in parsed) == 1
    assert (
        runs.status_without_curves(finished).seconds_per_step
        == runs.status(finished).seconds_per_step
    )


def test_two_runs_with_the_same_losses_have_the_same_curve_whatever_their_length(outputs) -> None:
    short, long = (staged.stage(name, steps) for name, steps in (("short", 60), ("long", 100)))
    one, other = (side["loss"] for side in library.compare(short.name, long.name)["runs"])
    assert one == other[:60] and len(other) == 100


def test_a_comparison_has_the_changed_settings_and_samples_of_one_prompt(finished) -> None:
    other = staged.stage("other", 40, **{"adapter.rank": 4, "base.model": "someone/model"})
    found = library.compare(finished.name, other.name)
    assert [(each["label"], each["was"], each["now"]) for each in found["settings"]] == [
        ("Network rank (dimension)", "16", "4")
    ]
    for folder, step in (
        (finished, 100),
        (other, 41),
    ):  # of one the second prompt, of the other the only one
        log = events.EventLog(folder / "events.jsonl")
        log.append(events.StepDone(step, 0.1, 1e-4, 0.25))
        log.append(events.SampleSaved(step, "a moon", 3, f"samples/{step:06d}-1.png"))
    assert [side["prompt"] for side in library.compare(finished.name, other.name)["runs"]] == [
        "a moon"
    ] * 2
    fresh = run_folder.create(runs.settings(other))
    assert library.compare(finished.name, fresh.name)["runs"][1]["loss"] == [], (
        "a run that has not begun has no curve"
    )
    assert [side["steps"] for side in found["runs"]] == [100, 40] and all(
        side["loss"] and side["sample"] for side in found["runs"]
    )


def test_the_model_card_names_base_trigger_and_file(finished) -> None:
    card = publishing.model_card(finished.name)
    assert (
        "base_model: someone/model" in card
        and "`zorbit`" in card
        and "maya.safetensors" in card
        and "<lora:maya:0.8>" in card
    )
    assert "trained for 100 steps" in card and "(samples/000100-0.png)" in card


def test_card_upload_and_preview_use_the_save_that_became_the_file(finished) -> None:
    """The file of a run that began to memorise, or was stopped, is an earlier save."""
    for end in (
        events.Finished(100, "maya.safetensors", 60, 31.0, 60),
        events.Stopped(100, "maya.safetensors", 60),
    ):
        events.EventLog(finished / "events.jsonl").append(end)
        card, hub = publishing.model_card(finished.name), Hub()
        assert (
            "trained for 60 steps" in card
            and "(samples/000060-0.png)" in card
            and "000100" not in card
        )
        publishing.push(finished.name, "me/maya", True, api=hub)
        assert hub.files == ["maya.safetensors", "samples/000060-0.png", "README.md"]
        assert preview_plans.save_choices(finished)[0] == (
            "Finished file (step 60)",
            "maya.safetensors",
        )
        assert files.adapter_file(finished, runs.status(finished))["name"] == "maya.safetensors"
        assert "000060-0" in run_cards.library_view()["cards"][0]["sample"]
    events.EventLog(finished / "events.jsonl").append(events.Launched(1, "0"))
    assert (
        files.adapter_file(finished, runs.status(finished))["name"] == "maya-000100.safetensors"
    ), "a resumed run goes on"


class Hub:
    """Records what would be uploaded to the Hub."""

    def __init__(self):
        self.files = []

    def create_repo(self, name, private, exist_ok):
        if "/" not in name:
            raise HFValidationError("Repo id must be user/name")
        self.made = (name, private)
        return SimpleNamespace(repo_id=name, __str__=None)

    def upload_file(self, path_or_fileobj, path_in_repo, repo_id):
        self.files.append(path_in_repo)


def test_adapter_samples_and_card_are_uploaded(finished) -> None:
    hub = Hub()
    publishing.push(finished.name, "me/maya", True, api=hub)
    assert (
        hub.made == ("me/maya", True)
        and hub.files[0] == "maya.safetensors"
        and hub.files[-1] == "README.md"
        and len(hub.files) == 3
    )
    with pytest.raises(TrainerError, match="form user/name"):
        publishing.push(finished.name, "maya", True, api=hub)


def test_a_new_run_with_the_name_of_a_deleted_one_has_new_settings(finished) -> None:
    assert runs.settings(finished).training.steps == 100
    library.delete(finished.name)
    again = staged.stage("maya", 10, total=50)
    assert (
        again == finished
        and runs.settings(again).training.steps == 50
        and runs.status(again).total_steps == 50
    )

"""Run folders: their names, their creation and their order."""

import os

import pytest

from trainer import config
from trainer.errors import StateError
from trainer.runs import events, run_folder


def create(name="maya"):
    return run_folder.create(config.RunConfig(name=name))


def test_runs_of_the_same_name_have_different_folders(outputs):
    folders = [create() for _ in range(3)]
    assert len(set(folders)) == 3
    assert folders[1].name == f"{folders[0].name}-2"


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "..",
        "a/b\\c",
        "x" * 80,
        "\n",
        "-rf",
        "$(id)",
        "C:\\x",
        "żółć 😀",
        "a\x00b",
        ".",
    ],
)
def test_any_name_gives_a_folder_inside_the_runs_folder(outputs, name):
    folder = create(name)
    assert folder.parent == run_folder.runs_folder()
    assert config.load(folder / "run.toml").name == name


@pytest.mark.parametrize(
    "name, expected",
    [
        ("Maya the dog!", "Maya-the-dog"),
        ("żółć", "żółć"),
        ("--__--", "lora"),
        ("", "lora"),
        ("ż" * 60, "ż" * 50),
        ("x" + "ż" * 60, "x" + "ż" * 49),
    ],
)
def test_a_slug_keeps_letters_and_has_at_most_100_bytes(name, expected):
    assert run_folder.slug(name) == expected


def test_a_folder_that_cannot_be_written_is_an_error_with_its_path(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="Cannot create the run folder .*file/runs"):
        run_folder.create(config.RunConfig(), tmp_path / "file" / "runs")


def test_runs_are_listed_newest_first(outputs):
    first, second, unstarted = create("b"), create("a"), create("c")
    for seconds, folder in ((1000.0, first), (2000.0, second)):
        launched = events.Launched(1, "0", time=seconds)
        events.EventLog(folder / "events.jsonl").append(launched)
    os.utime(unstarted / "run.toml", (1500.0, 1500.0))
    (run_folder.runs_folder() / "not-a-run").mkdir()
    assert run_folder.list_runs() == [second, unstarted, first]


def test_each_user_has_a_separate_outputs_folder(outputs, monkeypatch):
    assert run_folder.outputs_folder() == outputs
    monkeypatch.setattr(run_folder, "current_user", lambda: "maya")
    assert run_folder.outputs_folder() == outputs / "users" / "maya"
    assert run_folder.runs_folder() == outputs / "users" / "maya" / "runs"


@pytest.mark.parametrize("name", ["maya", "maya-kohya", "maya-diffusers", "maya-peft"])
def test_all_formats_of_an_adapter_share_the_embedding(tmp_path, name):
    expected = tmp_path / "maya-embedding.safetensors"
    assert run_folder.embedding_path(tmp_path / f"{name}.safetensors") == expected

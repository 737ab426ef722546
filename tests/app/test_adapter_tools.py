"""The adapter tools of the Library: the files that they make, their progress, and wrong options."""

import pytest

from app.actions import adapter_tools
from tests.browser.conftest import wait_for
from trainer.errors import StateError
from trainer.lora.formats.reader import read_adapter
from trainer.runs import run_folder


def result_of(job):
    def result():
        answer = adapter_tools.state(job)
        return "progress" not in answer and answer

    return wait_for(result, "the tool", 200)


OPTIONS = {"dialect": "kohya", "precision": "fp32", "rank": 0}


def test_an_adapter_is_described_converted_resized_and_composed(train_tiny):
    folder = train_tiny({"training.steps": 2, "saving.saves": 1, "saving.precision": "fp32"})
    other = train_tiny(
        {"training.steps": 2, "saving.saves": 1, "saving.precision": "fp32", "training.seed": 7}
    )
    looking, made = (
        adapter_tools.look(folder.name),
        adapter_tools.make(folder.name, OPTIONS | {"dialect": "diffusers"}),
    )
    with pytest.raises(StateError, match="wait until one"):
        adapter_tools.look(folder.name)
    facts = result_of(looking)["facts"]
    assert (
        facts["family"] == "Stable Diffusion 1.x"
        and facts["rank"] == "2"
        and facts["ranks"][-1][:2] == [2, pytest.approx(1)]
    )
    file = result_of(made)["file"]
    assert (
        file["href"] == f"/runfile/{folder.name}/tiny-diffusers-fp32.safetensors"
        and read_adapter(folder / file["name"]).file_format == "diffusers"
    )
    both = adapter_tools.make(
        folder.name, OPTIONS | {"other": other.name, "own_strength": 0.5, "other_strength": -1}
    )
    small = adapter_tools.make(folder.name, OPTIONS | {"rank": 1})
    answer = result_of(small)
    assert answer["kept"].endswith("%") and {
        m.rank for m in read_adapter(folder / answer["file"]["name"]).modules
    } == {1}
    modules = [
        {m.name: m.delta for m in read_adapter(f).modules}
        for f in (
            folder / result_of(both)["file"]["name"],
            folder / "tiny.safetensors",
            other / "tiny.safetensors",
        )
    ]
    for name, delta in modules[0].items():
        wanted = 0.5 * modules[1][name] - modules[2][name]
        assert (delta - wanted).abs().max() <= 1e-6
    assert not list(folder.glob(".tool-*"))
    with pytest.raises(StateError, match="not known any more"):
        adapter_tools.state(looking)


def test_a_tool_that_fails_reports_its_message_and_wrong_options_are_refused(tiny_run):
    folder = run_folder.create(tiny_run())
    with pytest.raises(StateError, match="has no adapter yet"):
        adapter_tools.look(folder.name)
    from trainer.runs.events import AdapterSaved, EventLog

    (folder / "tiny-000002.safetensors").write_bytes(b"x" * 1000)
    EventLog(folder / "events.jsonl").append(AdapterSaved(2, "tiny-000002.safetensors"))
    with pytest.raises(StateError, match="tiny-000002.safetensors is not a usable"):
        result_of(adapter_tools.look(folder.name))
    for options, words in (
        ({"dialect": "../x"}, "Choose a format"),
        ({"precision": None}, "Choose a precision"),
        ({"rank": "4; touch x"}, "whole number"),
        ({"rank": True}, "whole number"),
        ({"other": "../other"}, "no such run"),
        ({"other": folder.name, "own_strength": "1"}, "from -4 to 4"),
    ):
        with pytest.raises(StateError, match=words):
            adapter_tools.make(folder.name, OPTIONS | options)
    with pytest.raises(StateError, match="not known"):
        adapter_tools.state(["x"])

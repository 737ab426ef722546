"""The Library's tools: a process makes the file, the page asks how far it is; what a browser may send is checked."""

import time

import pytest

from app.actions import adapter_tools
from trainer.errors import StateError
from trainer.lora.formats.reader import read_adapter
from trainer.runs import run_folder


def ended(job):
    end = time.monotonic() + 200
    while "progress" in (answer := adapter_tools.state(job)):
        assert time.monotonic() < end
        time.sleep(0.1)
    return answer


WISHES = {"dialect": "kohya", "precision": "fp32", "rank": 0}


def test_a_file_is_looked_into_and_others_are_made_from_it(train_tiny):
    folder = train_tiny({"training.steps": 2, "saving.saves": 1, "saving.precision": "fp32"})
    other = train_tiny(
        {"training.steps": 2, "saving.saves": 1, "saving.precision": "fp32", "training.seed": 7}
    )
    looking, made = (
        adapter_tools.look(folder.name),
        adapter_tools.make(folder.name, WISHES | {"dialect": "diffusers"}),
    )
    with pytest.raises(StateError, match="wait until one"):
        adapter_tools.look(folder.name)
    facts = ended(looking)["facts"]
    assert (
        facts["family"] == "Stable Diffusion 1.x"
        and facts["rank"] == "2"
        and facts["ranks"][-1][:2] == [2, pytest.approx(1)]
    )
    file = ended(made)["file"]
    assert (
        file["href"] == f"/runfile/{folder.name}/tiny-diffusers-fp32.safetensors"
        and read_adapter(folder / file["name"]).file_format == "diffusers"
    )
    both = adapter_tools.make(
        folder.name, WISHES | {"other": other.name, "own_strength": 0.5, "other_strength": -1}
    )
    small = adapter_tools.make(folder.name, WISHES | {"rank": 1})
    answer = ended(small)
    assert answer["kept"].endswith("%") and {
        m.rank for m in read_adapter(folder / answer["file"]["name"]).modules
    } == {1}
    modules = [
        {m.name: m.delta for m in read_adapter(f).modules}
        for f in (
            folder / ended(both)["file"]["name"],
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


def test_a_tool_that_fails_says_its_sentence(tiny_run):
    folder = run_folder.create(tiny_run())
    with pytest.raises(StateError, match="has no adapter yet"):
        adapter_tools.look(folder.name)
    from trainer.runs.events import AdapterSaved, EventLog

    (folder / "tiny-000002.safetensors").write_bytes(b"x" * 1000)
    EventLog(folder / "events.jsonl").append(AdapterSaved(2, "tiny-000002.safetensors"))
    with pytest.raises(StateError, match="tiny-000002.safetensors is not a usable"):
        ended(adapter_tools.look(folder.name))
    for wishes, words in (
        ({"dialect": "../x"}, "Choose a format"),
        ({"precision": None}, "Choose a precision"),
        ({"rank": "4; touch x"}, "whole number"),
        ({"rank": True}, "whole number"),
        ({"other": "../other"}, "no such run"),
        ({"other": folder.name, "own_strength": "1"}, "from -4 to 4"),
    ):
        with pytest.raises(StateError, match=words):
            adapter_tools.make(folder.name, WISHES | wishes)
    with pytest.raises(StateError, match="not known"):
        adapter_tools.state(["x"])

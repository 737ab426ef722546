"""The description of an adapter: its kinds, ranks, and what is unusual about it."""

from pathlib import Path

import pytest
import torch

from trainer.cli import describe
from trainer.lora.formats.adapted_module import AdaptedModule
from trainer.lora.formats.reader import AdapterFile


def module(name="a", kernel=None, dora=False, scale=1.0, value=1.0):
    """Returns a LoRA of rank 2 on a linear layer, or on a convolution with a kernel."""
    down = torch.full((2, 4, *(kernel or ())), value)
    up = torch.full((4, 2, *((1, 1) if kernel else ())), value)
    tensors = {"lora_down.weight": down, "lora_up.weight": up}
    if dora:
        tensors["dora_scale"] = torch.ones(4, 1, *((1, 1) if kernel else ()))
    return AdaptedModule("unet", name, "lora", tensors, scale)


def file_with(modules, metadata):
    return AdapterFile(Path("a.safetensors"), "kohya", modules, metadata, "float16", [])


@pytest.mark.parametrize(
    "modules, counts",
    [
        ([module(), module()], {"LoRA": 2}),
        ([module(), module(kernel=(1, 1))], {"LoRA": 2}),
        ([module(), module(), module(kernel=(3, 3))], {"LoRA": 2, "LoCon": 1}),
        ([module(dora=True)], {"DoRA": 1}),
        ([module(kernel=(3, 3), dora=True)], {"DoRA (LoCon)": 1}),
    ],
)
def test_modules_are_counted_by_kind(modules, counts):
    assert describe.kind_counts(modules) == counts


def test_a_usual_adapter_has_no_notes():
    assert describe.unusual_properties(file_with([module()], {"a": "b"})) == []


def test_modules_that_change_nothing_are_counted():
    modules = [module("a"), module("b", value=0.0), module("c", value=0.0)]
    (note,) = describe.unusual_properties(file_with(modules, {"a": "b"}))
    assert note == "2 of 3 modules change nothing, such as b."


@pytest.mark.parametrize("scale, is_unusual", [(8.0, False), (8.5, True), (-8.5, True)])
def test_an_alpha_of_many_times_the_rank_is_unusual(scale, is_unusual):
    notes = describe.unusual_properties(file_with([module(scale=scale)], {"a": "b"}))
    assert bool(notes) == is_unusual


def test_a_file_without_metadata_is_unusual():
    (note,) = describe.unusual_properties(file_with([module()], {}))
    assert "no metadata" in note

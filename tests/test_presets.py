"""Every recipe that ships: complete, and it trains."""

import pytest

from trainer import config, run_folder
from trainer.__main__ import run_in
from trainer.errors import ConfigError
from trainer.presets import load_preset, load_presets


@pytest.mark.parametrize("name", load_presets())
def test_every_preset_trains(name, tiny_base, tiny_dataset, outputs):
    """As it is, but on the tiny base and for two steps."""
    preset = load_preset(name)
    run = config.replace(
        preset.config,
        {
            "base.model": str(tiny_base),
            "dataset.folder": str(tiny_dataset),
            "dataset.resolution": 32,
            "dataset.bucket_step": 8,
            "training.steps": 2,
            "saving.saves": 1,
            "sampling.inference_steps": 1,
            "sampling.prompts": ["a"],
        },
    )
    folder = run_folder.create(run)
    assert run_in(folder) == 0, run_folder.status(folder).message
    assert config.load(folder / "run.toml").preset == name


@pytest.mark.parametrize("name", load_presets())
def test_every_preset_says_what_it_is_for(name):
    preset = load_preset(name)
    assert preset.purpose.endswith(".") and preset.pictures and preset.memory and preset.time and len(preset.hash) == 12
    assert preset.config.adapter.alpha == preset.config.adapter.rank, "else learning rates cannot be compared between presets"


def test_each_base_has_the_three_purposes():
    by_base = {}
    for preset in load_presets().values():
        by_base.setdefault(preset.config.base.model, set()).add(preset.title)
    assert len(by_base) == 3 and all(titles == {"Subject", "Style", "Object"} for titles in by_base.values())


def test_an_unknown_preset_is_answered_with_those_there_are():
    with pytest.raises(ConfigError, match="embedded-subject"):
        load_preset("nonsense")

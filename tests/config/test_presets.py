"""Every recipe that ships: complete, and it trains."""

import pytest

from trainer import config
from trainer.config.presets import load_preset, load_presets
from trainer.errors import ConfigError
from trainer.runs import run_folder, run_status
from trainer.training.runner import run_in

KINDS = {
    "embedded": "sd1",
    "sd15": "sd1",
    "sd21": "sd2-v",
    "sdxl": "sdxl",
    "sd35m": "sd35-medium",
}  # of tiny bases, by how a preset begins


@pytest.fixture(scope="module")
def base_for(tmp_path_factory):
    from tests.tiny import save_tiny_base

    folders = {
        kind: save_tiny_base(tmp_path_factory.mktemp(kind) / "base", kind=kind)
        for kind in sorted(set(KINDS.values()))
    }
    return lambda preset: folders[KINDS[preset.partition("-")[0]]]


@pytest.mark.parametrize("name", load_presets())
def test_every_preset_trains(name, base_for, tiny_dataset, outputs):
    """As it is, but on a tiny base of its kind and for two steps."""
    preset = load_preset(name)
    run = config.replace(
        preset.config,
        {
            "base.model": str(base_for(name)),
            "base.quantization": "none",  # that of one preset needs a GPU
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
    assert run_in(folder) == 0, run_status.read_status(folder).message
    assert config.load(folder / "run.toml").preset == name


@pytest.mark.parametrize("name", load_presets())
def test_every_preset_says_what_it_is_for(name):
    preset = load_preset(name)
    assert (
        preset.purpose.endswith(".")
        and preset.pictures
        and preset.memory
        and preset.time
        and len(preset.hash) == 12
    )
    assert preset.config.adapter.alpha == preset.config.adapter.rank, (
        "else learning rates cannot be compared between presets"
    )


def test_each_base_has_the_four_purposes():
    by_base = {}
    for preset in load_presets().values():
        by_base.setdefault(preset.config.base.model, set()).add(preset.title)
    assert len(by_base) == len(KINDS) and all(
        titles >= {"Subject", "Style", "Object", "Character"} for titles in by_base.values()
    )


NATIVE = {"embedded": 64, "sd15": 512, "sd21": 768, "sdxl": 1024, "sd35m": 1024}


def test_each_preset_trains_at_the_size_its_base_draws():
    sizes = {name: preset.config.dataset.resolution for name, preset in load_presets().items()}
    assert sizes == {name: NATIVE[name.partition("-")[0]] for name in sizes}


def test_an_unknown_preset_is_answered_with_those_there_are():
    with pytest.raises(ConfigError, match="embedded-subject"):
        load_preset("nonsense")

"""Every preset that ships is complete, and trains."""

from pathlib import Path

import pytest

from tests.tiny import save_tiny_base
from trainer import config
from trainer.config import presets
from trainer.config.presets import load_preset, load_presets
from trainer.errors import ConfigError
from trainer.runs import run_folder, run_status
from trainer.training.runner import run_in

TINY_KINDS = {
    "embedded": "sd1",
    "sd15": "sd1",
    "sd21": "sd2-v",
    "sdxl": "sdxl",
    "sd35m": "sd35-medium",
}
"""The kind of tiny base model for a preset, by the first part of its name."""

RESOLUTIONS = {"embedded": 64, "sd15": 512, "sd21": 768, "sdxl": 1024, "sd35m": 1024}
"""The size for which a base model was made."""


def base_name(preset: str) -> str:
    return preset.partition("-")[0]


@pytest.fixture(scope="module")
def tiny_bases(tmp_path_factory):
    """The folder of a tiny base model by its kind."""
    return {
        kind: save_tiny_base(tmp_path_factory.mktemp(kind) / "base", kind=kind)
        for kind in sorted(set(TINY_KINDS.values()))
    }


@pytest.mark.parametrize("name", load_presets())
def test_every_preset_trains(name, tiny_bases, tiny_dataset, outputs):
    """Unchanged except for a tiny base model of its kind and two steps."""
    run = config.replace(
        load_preset(name).config,
        {
            "base.model": str(tiny_bases[TINY_KINDS[base_name(name)]]),
            "base.quantization": "none",  # quantization needs a GPU
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
def test_every_preset_describes_its_purpose_and_needs(name):
    preset = load_preset(name)
    assert preset.purpose.endswith(".")
    assert preset.pictures and preset.memory and preset.time
    assert len(preset.hash) == 12


@pytest.mark.parametrize("name", load_presets())
def test_alpha_equals_rank_in_every_preset(name):
    """Otherwise the learning rates of two presets could not be compared."""
    adapter = load_preset(name).config.adapter
    assert adapter.alpha == adapter.rank


def test_each_base_has_a_preset_for_four_purposes():
    titles = {}
    for preset in load_presets().values():
        titles.setdefault(preset.config.base.model, set()).add(preset.title)
    assert len(titles) == len(TINY_KINDS)
    for base, found in titles.items():
        assert found >= {"Subject", "Style", "Object", "Character"}, base


@pytest.mark.parametrize("name", load_presets())
def test_each_preset_trains_at_the_size_of_its_base(name):
    assert load_preset(name).config.dataset.resolution == RESOLUTIONS[base_name(name)]


def test_an_unknown_preset_is_refused_with_the_names_of_all():
    with pytest.raises(ConfigError, match="no preset named 'nonsense'.*embedded-subject"):
        load_preset("nonsense")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name = 'x'", r"\[about\] is missing or wrong"),
        ("[about]\ntitle = 'x'", r"\[about\] is missing or wrong"),
        ("[training]\nspeed = 1", "no such setting"),
        ("[about", "not a TOML file"),
    ],
)
def test_an_invalid_preset_is_refused_with_its_name(text: str, words: str, tmp_path: Path):
    path = tmp_path / "bad.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=words) as error:
        presets.read(path)
    assert "bad.toml" in str(error.value)

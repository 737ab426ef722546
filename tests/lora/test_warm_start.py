"""Training continues from an adapter file."""

import json

import pytest
import torch

from tests.bases import predict
from tests.lora.helpers import ADAPTERS, with_random_adapter
from trainer import config
from trainer.errors import ConfigError, ModelError
from trainer.lora import writer
from trainer.lora.metadata import shared_config
from trainer.runs import events, run_folder
from trainer.training import setup

SHARED_SETTINGS = ("kind", "targets", "lokr_factor", "alpha")
"""Settings that the file does not replace."""


@pytest.fixture
def run_from(base_of, load, tiny_run, tmp_path):
    """Returns a function from a kind to a run that continues from a file, and its effect."""

    def make(kind):
        base = load("sd1")
        effect, modules = with_random_adapter(base, kind)
        path = tmp_path / "first.safetensors"
        writer.save_adapter(path, "kohya", modules, base.family, torch.float32, {})
        settings = {
            "adapter.start_from": str(path),
            "adapter.rank": 2,
            "base.model": str(base_of("sd1")),
            "training.text_encoder_learning_rate": 1e-3,
        }
        for name in SHARED_SETTINGS:
            if name in ADAPTERS[kind]:
                settings[f"adapter.{name}"] = ADAPTERS[kind][name]
        return tiny_run(settings), effect

    return make


def prepare(run):
    folder = run_folder.create(run)
    return setup.prepare(run, folder, events.EventLog(folder / "events.jsonl"))


@pytest.mark.parametrize("kind", ["varying", "dora", "lokr"])
def test_step_0_has_the_effect_of_the_file_whatever_its_ranks_and_alphas(run_from, kind):
    run, effect = run_from(kind)
    base = prepare(run).model.base
    torch.testing.assert_close(predict(base.family, base.pipe), effect, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter.kind": "loha"}, "Set it to the kind of the file"),
        ({"training.text_encoder_learning_rate": 0.0}, "text_encoder, which is not trained"),
        ({"adapter.targets": "attention"}, "adapter.targets leaves out"),
        ({"adapter.start_from": "/nowhere.safetensors"}, "no adapter file"),
    ],
)
def test_settings_that_do_not_fit_the_file_are_refused_before_images_are_encoded(
    run_from, monkeypatch, changes, message
):
    run, _ = run_from("varying")
    monkeypatch.setattr(setup, "_encode_dataset", lambda *_: pytest.fail("images were encoded"))
    with pytest.raises((ConfigError, ModelError), match=message):
        prepare(config.replace(run, changes))


def test_an_initialization_cannot_be_combined_with_a_file(run_from):
    run, _ = run_from("varying")
    with pytest.raises(ConfigError, match="adapter.start_from"):
        config.replace(run, {"adapter.init": "gaussian"})


def test_the_metadata_contains_only_the_name_of_the_file(run_from):
    run, _ = run_from("varying")
    assert json.loads(shared_config(run))["adapter"]["start_from"] == "first.safetensors"

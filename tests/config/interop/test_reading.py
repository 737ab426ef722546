"""Which files are settings of another trainer, and how their values are applied."""

import json

import pytest

from tests.config.interop.helpers import carry_over
from trainer import config
from trainer.config import RunConfig, interop
from trainer.config.interop import ai_toolkit, image_parameters, kohya, onetrainer, translation
from trainer.errors import ConfigError

KOHYA = {"network_module": "networks.lora", "network_dim": 8, "output_name": "maya"}


@pytest.mark.parametrize(
    "text", ["", "[]", "just text", '{"a": 1}', "a: [", "\x00", "{" * 2000, "x" * 1_000_001]
)
def test_a_file_without_settings_is_refused_with_a_reason(text):
    with pytest.raises(ConfigError, match="^The file"):
        interop.read(text)


def test_yaml_aliases_are_refused():
    with pytest.raises(ConfigError, match="YAML aliases"):
        interop.read("network_dim: &a [1]\nnetwork_args: [*a, *a]")


@pytest.mark.parametrize(
    ("text", "program"),
    [
        (json.dumps(KOHYA), "kohya"),
        ("[network]\nnetwork_dim = 8", "kohya"),
        ('{"lora_rank": 8, "network_dim": 8}', "OneTrainer"),
        ("config: {process: [{network: {linear: 8}}]}", "ai-toolkit"),
        ('{"ss_network_dim": "8", "network_dim": 8}', "the metadata of the adapter"),
        ('{"parameters": "a cat"}', "the image"),
    ],
)
def test_the_program_is_recognised_by_its_settings(text, program):
    assert interop.read(text).program == program


def test_a_value_out_of_bounds_is_reported_and_the_others_are_applied():
    run, unsupported = carry_over(KOHYA | {"network_dim": 100_000, "unet_lr": float("nan")})
    assert run.adapter.rank == RunConfig().adapter.rank and run.name == "maya"
    assert run.training.learning_rate == RunConfig().training.learning_rate
    assert "adapter.rank = 100000" in unsupported and "training.learning_rate = nan" in unsupported


def test_values_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match="(?s)kohya do not fit together.*prodigy"):
        carry_over(KOHYA | {"optimizer_type": "Prodigy", "learning_rate": 1e-4})


SAMPLE_VALUES = (1, "1", "fp16", "adamw", "constant", "LORA", "lora", ["x"])
"""Each rule of a table accepts at least one of these."""


@pytest.mark.parametrize("module", [kohya, onetrainer, ai_toolkit, image_parameters])
def test_every_rule_of_a_table_sets_fields_that_exist(module):
    known = dict(config.fields())
    for name, rule in module.TABLE.rules.items():
        paths = set()
        for value in SAMPLE_VALUES:
            table = translation.Table({name: rule}, ignored=translation.names(""))
            changes, _ = translation.translate(table, {name: value})
            paths |= changes.keys()
        assert paths and paths <= known.keys(), name

"""Contradictions between settings are refused, each with its own message."""

import pytest

from trainer import config
from trainer.config import RunConfig, rules
from trainer.errors import ConfigError

REFUSED = [
    ({"training.learning_rate": 0.0}, "are both 0, so nothing would be trained"),
    (
        {
            "training.learning_rate": 0.0,
            "training.text_encoder_learning_rate": 1e-5,
            "training.text_encoder_until": 0.5,
        },
        "text_encoder_until = 0.5 leaves nothing to train",
    ),
    ({"training.devices": 3, "training.batch_size": 2}, "3 devices cannot share a step of 2"),
    ({"base.quantization": "4bit", "adapter.kind": "dora"}, "base.quantization = 4bit does not"),
    ({"training.warmup": 1.5}, "warmup = 1.5 is neither"),
    ({"training.warmup": 10, "training.steps": 10}, "10 steps does not fit into a run of 10"),
    ({"training.optimizer": "collection"}, "training.optimizer_name is given if and only if"),
    ({"training.optimizer": "prodigy"}, "prodigy finds the learning rate itself"),
    (
        {"training.optimizer": "schedule_free_adamw"},
        "schedule-free optimiser replaces the schedule",
    ),
    (
        {
            "training.optimizer": "collection",
            "training.optimizer_name": "ScheduleFreeSGD",
            "training.lr_schedule": "constant",
            "training.ema_decay": 0.9,
        },
        "schedule-free optimiser averages the weights",
    ),
    ({"objective.min_timestep": 500, "objective.max_timestep": 500}, "(500) is not below"),
    ({"objective.noise_offset_random": True}, "needs an objective.noise_offset above 0"),
    ({"base.prediction": "epsilon", "base.zero_terminal_snr": "on"}, "needs v prediction"),
    ({"training.early_stop": 2, "dataset.hold_out": 0.0}, "needs a validation set"),
    ({"training.early_stop": 5, "saving.saves": 5}, "can never end a run with saving.saves = 5"),
    ({"saving.dialects": ["peft"]}, "contains only peft"),
    (
        {"saving.dialects": ["kohya", "diffusers", "peft"], "adapter.kind": "lokr"},
        "diffusers and peft cannot hold adapter.kind = lokr",
    ),
    ({"dataset.random_crop": True, "dataset.crop": "none"}, "dataset.random_crop crops images"),
    ({"objective.prior_preservation": 1.0}, "with and without the trigger word"),
    ({"adapter.trigger_vectors": 2}, "adapter.trigger_vectors = 2 needs a trigger word"),
    (
        {
            "adapter.trigger_vectors": 2,
            "dataset.trigger": "x",
            "training.trigger_learning_rate": 0.0,
        },
        "adapter.trigger_vectors = 2 learns nothing",
    ),
    (
        {"dataset.caption_dropout": 1.0, "training.text_encoder_learning_rate": 1e-5},
        "drops every caption",
    ),
    ({"dataset.class_pictures": 9, "dataset.class_words": "a dog"}, "dataset.class_pictures = 9"),
    (
        {"dataset.bucket_step": 64, "dataset.resolution": 512, "dataset.resolutions": [32]},
        "bucket_step (64) is larger than the smallest resolution (32)",
    ),
    ({"adapter.init": "gaussian", "adapter.start_from": "x"}, "does not go with adapter.start"),
    ({"adapter.init": "pissa", "adapter.rank_dropout": 0.1}, "rank_dropout does not go with"),
    ({"adapter.init": "olora", "adapter.module_dropout": 0.1}, "module_dropout does not go with"),
    ({"adapter.init": "pissa", "adapter.max_norm": 1.0}, "max_norm does not go with"),
    ({"adapter.kind": "loha", "adapter.dropout": 0.1}, "dropout does not exist for loha"),
    ({"adapter.kind": "lokr", "adapter.init": "gaussian"}, "gaussian does not exist for lokr"),
    ({"adapter.kind": "dora", "adapter.rank_dropout": 0.1}, "do not exist for dora"),
    ({"adapter.kind": "dora", "adapter.init": "olora"}, "olora does not go with dora"),
    ({"adapter.lokr_factor": 4}, "for adapter.kind = lokr only, and the kind is lora"),
    ({"adapter.trigger_init": "dog"}, "adapter.trigger_init is the start of"),
    ({"adapter.target_pattern": "a", "adapter.targets": "linear"}, "give one of them only"),
]

ALLOWED = [
    {"training.learning_rate": 0.0, "training.text_encoder_2_learning_rate": 1e-5},
    {"training.text_encoder_until": 0.5},
    {"training.devices": 4, "training.batch_size": 2, "training.gradient_accumulation_steps": 2},
    {"base.quantization": "8bit", "adapter.kind": "rslora"},
    {"training.warmup": 0.9},
    {"training.warmup": 9, "training.steps": 10},
    {"training.warmup": 500, "training.steps": 0},
    {"training.optimizer": "collection", "training.optimizer_name": "came"},
    {"training.optimizer": "prodigy", "training.learning_rate": 1.0},
    {
        "training.optimizer": "collection",
        "training.optimizer_name": "Prodigy",
        "training.learning_rate": 0.1,
        "training.text_encoder_learning_rate": 0.1,
    },
    {"training.optimizer": "schedule_free_adamw", "training.lr_schedule": "constant"},
    {"objective.min_timestep": 499, "objective.max_timestep": 500},
    {"objective.noise_offset_random": True, "objective.noise_offset": 0.05},
    {"base.prediction": "v", "base.zero_terminal_snr": "on"},
    {"training.early_stop": 4, "saving.saves": 5},
    {"saving.dialects": ["diffusers", "peft"]},
    {"saving.dialects": ["kohya", "peft"], "adapter.kind": "loha"},
    {"objective.prior_preservation": 1.0, "dataset.trigger": "x"},
    {"adapter.trigger_vectors": 2, "dataset.trigger": "x", "adapter.trigger_init": "dog"},
    {"dataset.caption_dropout": 1.0},
    {"dataset.caption_dropout": 0.99, "training.text_encoder_learning_rate": 1e-5},
    {"dataset.bucket_step": 64, "dataset.resolution": 64},
    {"adapter.init": "pissa", "adapter.dropout": 0.1},
    {"adapter.kind": "lokr", "adapter.rank_dropout": 0.1, "adapter.lokr_factor": 4},
    {"adapter.kind": "dora", "adapter.dropout": 0.1, "adapter.init": "orthogonal"},
]


def unchecked(changes):
    """Returns a RunConfig with these values, without the check of the rules."""
    sections = {name: {} for name in RunConfig.model_fields}
    for path, value in changes.items():
        section, _, name = path.partition(".")
        sections[section][name] = value
    return RunConfig.model_construct(
        **{name: type(getattr(RunConfig(), name))(**values) for name, values in sections.items()}
    )


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_settings_that_contradict_each_other_are_refused(changes, words):
    with pytest.raises(ConfigError) as error:
        config.replace(RunConfig(), changes)
    first_line, *errors = str(error.value).splitlines()
    assert first_line == "The settings cannot be used:"
    assert len(errors) == 1 and words in errors[0]


@pytest.mark.parametrize("changes", ALLOWED)
def test_settings_just_inside_a_rule_are_accepted(changes):
    assert rules.first_conflict(config.replace(RunConfig(), changes)) == ""


def test_every_rule_has_an_example_and_in_this_order():
    """The first broken rule is reported, so the order decides what a user reads."""
    broken = []
    for changes, _ in REFUSED:
        run = unchecked(changes)
        broken.append(next(i for i, rule in enumerate(rules.RULES) if rule.is_broken(run)))
    assert broken == list(range(len(rules.RULES)))


def test_the_first_broken_rule_is_reported():
    changes = {"adapter.lokr_factor": 4, "training.learning_rate": 0.0}
    assert rules.first_conflict(unchecked(changes)).startswith("training.learning_rate")


def test_prodigy_needs_its_rate_for_the_trigger_too():
    rates = {
        "training.optimizer": "prodigy",
        "training.learning_rate": 1.0,
        "adapter.trigger_vectors": 1,
        "dataset.trigger": "x",
    }
    with pytest.raises(ConfigError, match="prodigy"):
        config.replace(RunConfig(), rates)
    config.replace(RunConfig(), rates | {"training.trigger_learning_rate": 1.0})


def test_vectors_of_the_trigger_need_captions():
    changes = {"dataset.caption_dropout": 1.0, "adapter.trigger_vectors": 1, "dataset.trigger": "x"}
    with pytest.raises(ConfigError, match="drops every caption"):
        config.replace(RunConfig(), changes)

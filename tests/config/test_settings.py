"""Each setting is declared once: label, help, bounds and choices come from its field."""

import pytest
from pydantic import Field

from trainer import config
from trainer.config import RunConfig
from trainer.config.settings import Section
from trainer.errors import ConfigError

TERMS = {
    "preset",
    "dataset.resolution",
    "dataset.random_crop",
    "dataset.prior_loss_weight",
    "adapter.dropout",
    "adapter.rank_dropout",
    "adapter.module_dropout",
    "training.gradient_accumulation_steps",
    "training.learning_rate",
    "training.text_encoder_learning_rate",
    "training.text_encoder_2_learning_rate",
    "training.optimizer",
    "training.weight_decay",
    "training.gradient_checkpointing",
    "training.seed",
    "objective.huber_schedule",
    "objective.timestep_sampling",
    "objective.min_timestep",
    "objective.max_timestep",
    "objective.noise_offset",
    "sampling.negative_prompt",
    "sampling.seed",
}
"""Settings whose code name is the term that other trainers use too."""


def test_every_setting_has_a_label_in_the_words_of_other_trainers():
    for path, field in config.fields():
        code_name = path.rpartition(".")[2].replace("_", " ")
        assert field.title and field.title[0].isupper(), path
        is_code_name = field.title.lower() == code_name and field.title == code_name.capitalize()
        assert is_code_name == (path in TERMS), f"{path}: {field.title}"


def test_labels_are_unique_within_their_section():
    labels = [(path.rpartition(".")[0], field.title) for path, field in config.fields()]
    assert len(labels) == len(set(labels))


def test_every_help_is_one_line_of_sentences():
    for path, field in config.fields():
        text = field.description
        assert text and text.endswith("."), path
        assert text == " ".join(text.split()), path


def test_help_over_several_lines_is_joined():
    class Example(Section):
        setting: int = Field(default=1, title="Setting")
        """First line,
        second line."""

    assert Example.model_fields["setting"].description == "First line, second line."


def test_all_errors_are_reported_at_once_by_path():
    changes = {"training.lr_schedule": "wavy", "training.steps": -1, "adapter.rank": "many"}
    with pytest.raises(ConfigError) as error:
        config.replace(RunConfig(), changes)
    lines = str(error.value).splitlines()
    assert [line.partition(":")[0] for line in lines[1:]] == [
        "- adapter.rank",
        "- training.steps",
        "- training.lr_schedule",
    ]
    assert "'cosine'" in lines[3] and "(got 'wavy')" in lines[3]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training.learningrate": 1}, "no setting named training.learningrate"),
        ({"training.learning_rate": float("nan")}, "training.learning_rate"),
        ({"training.learning_rate": float("inf")}, "training.learning_rate"),
        ({"training.learning_rate": 1.5}, "less than or equal to 1"),
        ({"dataset.resolution": 100}, "multiple of 8"),
        ({"dataset.resolutions": [100]}, "dataset.resolutions.0.*multiple of 8"),
        ({"name": ""}, "at least 1 character"),
        ({"saving.dialects": ["onnx"]}, "'kohya', 'diffusers' or 'peft'"),
    ],
)
def test_a_value_out_of_bounds_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        config.replace(RunConfig(), changes)


def test_blanks_around_the_trigger_word_are_removed():
    run = config.replace(RunConfig(), {"dataset.trigger": " maya the cat "})
    assert run.dataset.trigger == "maya the cat"


def test_choices_are_read_from_the_type_of_a_field():
    by_path = dict(config.fields())
    assert config.choices(by_path["training.lr_schedule"])[:2] == ("constant", "linear")
    assert config.choices(by_path["training.steps"]) == ()
    assert config.several_choices(by_path["saving.dialects"]) == ("kohya", "diffusers", "peft")
    assert config.several_choices(by_path["sampling.prompts"]) == ()
    assert config.several_choices(by_path["training.lr_schedule"]) == ()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("adapter.rank", 8, ""),
        ("adapter.rank", 0, "Input should be greater than or equal to 1"),
        ("training.learning_rate", float("nan"), "Input should be a finite number"),
        ("adapter.alphas", "mid_block=0", "an alpha is above 0"),
        ("training.learning_rate", 0, ""),
    ],
)
def test_one_value_is_checked_without_the_others(path, value, message):
    found = config.value_error(path, value)
    assert found.startswith(message) and bool(found) == bool(message)


@pytest.mark.parametrize(
    ("second", "expected"),
    [(-1.0, 2e-5), (0.0, 0.0), (3e-5, 3e-5)],
)
def test_the_second_text_encoder_uses_the_rate_of_the_first_unless_set(second, expected):
    training = config.Training(
        learning_rate=1e-4, text_encoder_learning_rate=2e-5, text_encoder_2_learning_rate=second
    )
    assert training.rate_of("text_encoder_2") == expected
    assert training.rate_of("text_encoder") == 2e-5
    assert training.rate_of("unet") == training.rate_of("transformer") == 1e-4
    assert training.rate_of("trigger") == 1e-3

"""One declaration a knob: bounds, help, files and faults all come from it."""

import tomllib

import pytest

from trainer import config
from trainer.config import RunConfig
from trainer.errors import ConfigError


def test_a_saved_config_loads_as_the_same(tmp_path):
    run = config.replace(
        RunConfig(),
        {
            "name": 'żółć "quoted" \\ 😀',
            "training.learning_rate": 3e-5,
            "sampling.prompts": ["a\nb", "c"],
            "dataset.trigger": "[x]\n= 1",
        },
    )
    path = tmp_path / "run.toml"
    path.write_text(config.to_toml(run), encoding="utf-8")
    assert config.load(path) == run


def test_every_knob_has_help_that_ends_as_a_sentence():
    for path, field in config.fields():
        assert field.description and field.description.strip().endswith("."), path


def test_all_faults_are_told_at_once_by_path():
    with pytest.raises(ConfigError) as error:
        config.replace(
            RunConfig(),
            {"training.lr_schedule": "wavy", "training.steps": -1, "adapter.rank": "many"},
        )
    assert all(
        part in str(error.value)
        for part in ("training.lr_schedule", "cosine", "training.steps", "adapter.rank")
    )


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"training.learning_rate": 0.0}, "both 0"),
        ({"dataset.bucket_step": 256, "dataset.resolution": 64}, "bucket_step"),
        (
            {"dataset.caption_dropout": 1.0, "training.text_encoder_learning_rate": 1e-5},
            "drops every caption",
        ),
        (
            {"dataset.caption_dropout": 1.0, "dataset.trigger": "x", "adapter.trigger_vectors": 1},
            "drops every caption",
        ),
        (
            {"adapter.init": "pissa", "adapter.rank_dropout": 0.1},
            "are not those of the base",
        ),
        ({"training.learningrate": 1}, "no setting named training.learningrate"),
        ({"training.learning_rate": float("nan")}, "learning_rate"),
        ({"training.learning_rate": float("inf")}, "learning_rate"),
    ],
)
def test_what_contradicts_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        config.replace(RunConfig(), changes)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"name = ", "not a TOML file"),
        (b"\xff\xfe\x00", "not a TOML file"),
        (b"[training]\nspeed = 3", "training.speed: there is no such setting"),
        (b"a = " + b"[" * 5000, "not a TOML file"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, words):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as error:
        config.load(path)
    assert "bad.toml" in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.toml"):
        config.load(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("training.steps=300", ("training.steps", 300)),
        ("training.learning_rate=1e-4", ("training.learning_rate", 1e-4)),
        ("dataset.trigger=zorbit", ("dataset.trigger", "zorbit")),
        ('sampling.prompts=["a", "b"]', ("sampling.prompts", ["a", "b"])),
        ("dataset.folder=/tmp/a=b; touch x", ("dataset.folder", "/tmp/a=b; touch x")),
    ],
)
def test_settings_from_the_command_line(text, expected):
    assert config.parse_setting(text) == expected


def test_a_trigger_is_found_in_captions_whatever_blanks_are_around_it():
    assert (
        config.replace(RunConfig(), {"dataset.trigger": " maya the cat "}).dataset.trigger
        == "maya the cat"
    )


def test_the_fingerprint_covers_what_alters_the_numbers_only():
    run = RunConfig()
    assert config.fingerprint(
        config.replace(run, {"name": "x", "saving.precision": "fp32", "sampling.seed": 5})
    ) == config.fingerprint(run)
    for changes in (
        {"training.seed": 1},
        {"adapter.alpha": 8.0},
        {"objective.noise_offset": 0.1},
        {"dataset.trigger": "x"},
    ):
        assert config.fingerprint(config.replace(run, changes)) != config.fingerprint(run)


def test_a_setting_that_a_later_version_brings_leaves_old_states_resumable():
    class Later(config.Training):
        new_knob: float = 0.5
        """Nothing is known of it yet."""

    class Next(config.RunConfig):
        training: Later = Later()

    run = config.replace(config.RunConfig(), {"adapter.rank": 8, "training.steps": 100})
    updated = Next.model_validate(tomllib.loads(config.to_toml(run)))
    assert updated.training.new_knob == 0.5 and config.fingerprint(updated) == config.fingerprint(
        run
    )
    assert config.fingerprint(
        updated.model_copy(update={"training": Later(steps=100, new_knob=1.0)})
    ) != config.fingerprint(run)

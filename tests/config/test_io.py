"""Settings in files, on the command line and as a fingerprint."""

import tomllib

import pytest
from pydantic import Field

from trainer import config
from trainer.config import RunConfig
from trainer.errors import ConfigError


def test_saved_settings_load_as_the_same(tmp_path):
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


def test_each_setting_in_a_file_has_its_help_above_it_on_one_line():
    lines = config.to_toml(RunConfig()).splitlines()
    for path, field in config.fields():
        section, _, name = path.rpartition(".")
        start = lines.index(f"[{section}]") if section else 0
        settings = lines[start:]
        number = next(i for i, line in enumerate(settings) if line.startswith(f"{name} = "))
        assert settings[number - 1] == f"# {field.description}"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"name = ", "not a TOML file"),
        (b"\xff\xfe\x00", "not a TOML file"),
        (b"[training]\nspeed = 3", "training.speed: there is no such setting"),
        (b"a = " + b"[" * 5000, "not a TOML file"),
    ],
)
def test_an_invalid_file_is_reported_with_its_name(tmp_path, content, words):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as error:
        config.load(path)
    assert "bad.toml" in str(error.value)


def test_a_missing_file_is_reported_with_its_name(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.toml"):
        config.load(tmp_path / "nowhere.toml")


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbfname = 'x'")
    assert config.load(path).name == "x"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training.steps=300", ("training.steps", 300)),
        ("training.learning_rate=1e-4", ("training.learning_rate", 1e-4)),
        ("dataset.trigger=zorbit", ("dataset.trigger", "zorbit")),
        ('sampling.prompts=["a", "b"]', ("sampling.prompts", ["a", "b"])),
        ("dataset.folder=/tmp/a=b; touch x", ("dataset.folder", "/tmp/a=b; touch x")),
    ],
)
def test_settings_are_read_from_the_command_line(text, expected):
    assert config.parse_setting(text) == expected


def test_a_setting_without_a_value_is_refused():
    with pytest.raises(ConfigError, match="--set takes key=value.*'training.steps'"):
        config.parse_setting("training.steps")


GOLDEN_FINGERPRINTS = [
    ({}, "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"),
    (
        {
            "name": "old-run",
            "dataset.folder": "/data/cats",
            "dataset.trigger": "zorbit",
            "dataset.repeats": ["closeups = 3"],
            "dataset.resolutions": [768],
            "adapter.kind": "lokr",
            "adapter.ranks": "mid_block=32, attn2=8",
            "training.learning_rate": 3e-5,
            "training.optimizer": "collection",
            "training.optimizer_name": "came",
            "training.optimizer_args": ["betas=(0.9, 0.99)"],
            "objective.min_snr_gamma": 0,
            "saving.saves": 3,
            "sampling.prompts": ["a cat"],
            "training.devices": 1,
        },
        "ba2d56fa02ed5bba0c6b4139421c92cd294730621641fd73ccaa2525f25b15e7",
    ),
]


@pytest.mark.parametrize(("changes", "expected"), GOLDEN_FINGERPRINTS)
def test_the_fingerprint_of_an_old_run_never_changes(changes, expected):
    """A checkpoint is resumed only if its fingerprint equals the fingerprint of the settings."""
    assert config.fingerprint(config.replace(RunConfig(), changes)) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "x"},
        {"preset": "sd15-style"},
        {"saving.precision": "fp32"},
        {"sampling.seed": 5},
        {"dataset.folder": "/moved"},
        {"dataset.regularisation_folder": "/moved"},
        {"training.devices": 2},
    ],
)
def test_the_fingerprint_ignores_what_does_not_affect_the_numbers(changes):
    run = config.replace(RunConfig(), {"dataset.folder": "/data", "training.batch_size": 2})
    assert config.fingerprint(config.replace(run, changes)) == config.fingerprint(run)


@pytest.mark.parametrize(
    "changes",
    [
        {"training.seed": 1},
        {"adapter.alpha": 8.0},
        {"objective.noise_offset": 0.1},
        {"dataset.trigger": "x"},
        {"base.model": "other"},
    ],
)
def test_the_fingerprint_covers_what_affects_the_numbers(changes):
    run = RunConfig()
    assert config.fingerprint(config.replace(run, changes)) != config.fingerprint(run)


def test_a_new_setting_of_a_later_version_keeps_old_runs_resumable():
    class LaterTraining(config.Training):
        new_setting: float = Field(default=0.5, title="New setting")
        """A setting that did not exist before."""

    class LaterConfig(config.RunConfig):
        training: LaterTraining = LaterTraining()

    run = config.replace(RunConfig(), {"adapter.rank": 8, "training.steps": 100})
    later = LaterConfig.model_validate(tomllib.loads(config.to_toml(run)))
    assert later.training.new_setting == 0.5
    assert config.fingerprint(later) == config.fingerprint(run)
    changed = later.model_copy(update={"training": LaterTraining(steps=100, new_setting=1.0)})
    assert config.fingerprint(changed) != config.fingerprint(run)

"""The form is made from `RunConfig`: every field has a widget, and settings survive the form."""

import ast
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from app.settings import form
from app.tabs import train_form
from trainer import config
from trainer.config import RunConfig, presets

APP = Path(form.__file__).parents[1]


@pytest.fixture(scope="module")
def fields() -> dict[str, Any]:
    with gr.Blocks():
        return train_form.basic_widgets() | train_form.advanced_widgets()[0]


def test_every_field_has_a_widget(fields: dict[str, Any]) -> None:
    names = {"base.model": "base"}
    for path in form.all_fields():
        assert names.get(path, path) in fields, path
    assert list(fields) == train_form.field_names()


def test_label_help_and_default_of_a_widget_come_from_its_field() -> None:
    for path, field in form.all_fields().items():
        widget = form.widget(path)
        assert widget.label == field.title, path
        assert widget.info.startswith(field.description), path
        assert form.from_widget(path, widget.value) == config.get(RunConfig(), path), path


@pytest.mark.parametrize(
    ("path", "bounds"),
    [
        ("adapter.rank", "(From 1 to 512.)"),
        ("adapter.alpha", "(Above 0, to 4096.)"),
        ("adapter.dropout", "(From 0 to below 1.)"),
    ],
)
def test_the_help_ends_with_the_bounds(path: str, bounds: str) -> None:
    assert form.help_text(path) == f"{form.all_fields()[path].description} {bounds}"


@pytest.mark.parametrize("path", ["training.steps", "adapter.max_norm", "name", "training.seed"])
def test_the_help_has_no_bounds_that_nobody_would_reach(path: str) -> None:
    assert form.help_text(path) == form.all_fields()[path].description


def test_the_kind_of_a_widget_follows_the_type_of_its_field() -> None:
    schedule = form.widget("training.lr_schedule")
    assert [value for _, value in schedule.choices][:3] == ["constant", "linear", "cosine"]
    formats = form.widget("saving.dialects")
    assert [value for _, value in formats.choices] == ["kohya", "diffusers", "peft"]
    assert isinstance(formats, gr.CheckboxGroup)
    assert isinstance(form.widget("training.gradient_checkpointing"), gr.Checkbox)
    assert form.widget("training.batch_size").precision == 0
    assert form.widget("training.learning_rate").precision is None
    assert form.widget("sampling.prompts").lines == 2


@pytest.mark.parametrize("name", presets.load_presets())
def test_settings_survive_the_form(name: str) -> None:
    changes = {
        "sampling.prompts": ["one", "two ${x}"],
        "dataset.trigger": "zorbit",
        "base.model": "a/b",
    }
    run = config.replace(presets.load_preset(name).config, changes)
    paths = list(form.all_fields())
    values = dict(zip(paths, form.widget_values(paths, run), strict=True))
    assert form.read(values) == run


def test_each_wrong_value_is_reported_with_its_field() -> None:
    errors = form.errors(
        {
            "adapter.rank": 0,
            "training.steps": None,
            "training.learning_rate": 2,
            "name": "",
            "training.seed": 1.5,
            "adapter.alphas": "mid_block=0",
            "dataset.trigger": "x",
        }
    )
    assert errors == {
        "adapter.rank": "Should be greater than or equal to 1.",
        "training.steps": "Please give a value.",
        "training.learning_rate": "Should be less than or equal to 1.",
        "name": "String should have at least 1 character.",
        "training.seed": "Should be a valid integer, got a number with a fractional part.",
        "adapter.alphas": "An alpha is above 0; to leave a block out, set its rank to 0.",
    }


def test_a_contradiction_is_reported_without_a_field() -> None:
    rates = {"training.learning_rate": 0, "training.text_encoder_learning_rate": 0}
    errors = form.errors(rates)
    assert list(errors) == [""] and errors[""].startswith("training.learning_rate and")


def test_valid_values_have_no_errors() -> None:
    values = {"training.learning_rate": 1, "dataset.resolution": 64, "dataset.bucket_step": 8}
    assert form.errors(values) == {}


def test_differences_are_shown_as_short_texts() -> None:
    run = config.replace(
        RunConfig(),
        {
            "training.learning_rate": 2e-4,
            "training.cuda_graphs": False,
            "sampling.prompts": ["x" * 99],
        },
    )
    rows = form.differences(run, RunConfig(), list(form.all_fields()))
    assert [(row["label"], row["was"], row["now"]) for row in rows] == [
        ("Learning rate", "0.0001", "0.0002"),
        ("CUDA graphs", "on", "off"),
        ("Sample prompts", "", "x" * 39 + "…"),
    ]


def test_the_settings_of_a_run_fill_the_form(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATELIER_OUTPUTS", str(tmp_path))
    changes = {"name": "x", "training.steps": 7}
    run = config.replace(presets.load_preset("embedded-style").config, changes)
    shown = dict(zip(train_form.field_names(), train_form.show_settings(run), strict=True))
    assert shown["name"] == "x" and shown["training.steps"] == 7 and shown["base"] == "embedded"
    other = config.replace(run, {"base.model": "someone/model"})
    shown = dict(zip(train_form.field_names(), train_form.show_settings(other), strict=True))
    assert shown["base"] == train_form.OWN


def test_no_help_is_repeated_in_the_code_of_the_page() -> None:
    descriptions = {field.description for field in form.all_fields().values()}
    for path in APP.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert not texts & descriptions, path


def test_presets_suit_the_kind_of_the_base_model(tmp_path: Path):
    from tests.tiny import save_tiny_base

    assert {preset.config.base.model for preset in train_form.presets_for("embedded")} == {
        "embedded"
    }
    named = {
        "": train_form.SD15,
        "someone/realistic": train_form.SD15,
        "someone/juggernautXL": train_form.SDXL,
        "/nowhere": train_form.SD15,
    }
    named |= {
        "stabilityai/stable-diffusion-3.5-large": train_form.SD35M,
        "someone/stable-diffusion-2-1-base": train_form.SD21,
    }
    for own, base in named.items():
        assert {
            preset.config.base.model for preset in train_form.presets_for(train_form.OWN, own)
        } == {base}, own
    for kind, base in {
        "sd1": train_form.SD15,
        "sd2": train_form.SD21,
        "sd35-medium": train_form.SD35M,
    }.items():
        folder = save_tiny_base(tmp_path / f"xl-in-name-only-{kind}", kind=kind)
        assert train_form.presets_for(train_form.OWN, str(folder))[0].config.base.model == base
    assert set(train_form.BASE_TITLES) == {base for _, base in train_form.base_choices()} - {
        train_form.OWN
    }

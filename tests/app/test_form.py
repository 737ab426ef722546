"""The form is made from RunConfig: every field has a widget, and a config goes through the widgets and back."""

import ast
from pathlib import Path

import gradio as gr
import pytest

from app.settings import form
from app.tabs import train
from trainer import config
from trainer.config import presets

APP = Path(form.__file__).parents[1]


@pytest.fixture(scope="module")
def fields() -> dict:
    with gr.Blocks():
        return train._settings_form() | train._advanced_form()[0]


def test_every_field_has_a_widget(fields: dict) -> None:
    by_hand = {"base.model": "base", "preset": "preset"}
    for path in form.all_fields():
        assert by_hand.get(path, path) in fields, path
    assert list(fields) == train._field_names()


def test_label_help_bounds_and_choices_come_from_the_field() -> None:
    rate = form.widget("training.learning_rate")
    assert rate.label == "Learning rate" and rate.info.startswith(
        form.all_fields()["training.learning_rate"].description
    )
    assert form.widget("adapter.rank").info.endswith("(From 1 to 512.)")
    assert form.widget("training.lr_schedule").label == "LR scheduler"
    assert [value for _, value in form.widget("training.lr_schedule").choices][:3] == [
        "constant",
        "linear",
        "cosine",
    ]
    assert isinstance(form.widget("training.gradient_checkpointing"), gr.Checkbox)
    assert all(form.help_text(path) for path in form.all_fields())


@pytest.mark.parametrize("name", presets.load_presets())
def test_a_config_survives_the_form(name: str) -> None:
    run = config.replace(
        presets.load_preset(name).config,
        {"sampling.prompts": ["one", "two ${x}"], "dataset.trigger": "zorbit", "base.model": "a/b"},
    )
    paths = list(form.all_fields())
    assert form.read(dict(zip(paths, form.widget_values(paths, run), strict=True))) == run


def test_faults_name_their_fields() -> None:
    wrong = form.errors(
        {
            "adapter.rank": 0,
            "training.steps": None,
            "training.learning_rate": 2,
            "name": "",
            "training.seed": 1.5,
            "dataset.trigger": "x",
        }
    )
    assert set(wrong) == {
        "adapter.rank",
        "training.steps",
        "training.learning_rate",
        "name",
        "training.seed",
    }
    assert form.errors(
        {"training.learning_rate": 0, "training.text_encoder_learning_rate": 0}
    ).keys() == {""}
    assert (
        form.errors(
            {"training.learning_rate": 1, "dataset.resolution": 64, "dataset.bucket_step": 8}
        )
        == {}
    )


def test_the_settings_of_a_run_come_back(
    fields: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATELIER_OUTPUTS", str(tmp_path))
    run = config.replace(
        presets.load_preset("embedded-style").config, {"name": "x", "training.steps": 7}
    )
    shown = dict(zip(train._field_names(), train.show_settings(run), strict=True))
    assert shown["name"] == "x" and shown["training.steps"] == 7 and shown["base"] == "embedded"
    other = dict(
        zip(
            train._field_names(),
            train.show_settings(config.replace(run, {"base.model": "someone/model"})),
            strict=True,
        )
    )
    assert other["base"] == train.OWN


def test_nothing_is_typed_twice() -> None:
    """No number, bound or help of a knob stands in the page's code: only its path may."""
    descriptions = [field.description for field in form.all_fields().values()]
    for path in APP.rglob("*.py"):
        texts = {
            node.value
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not texts & set(descriptions), path


def test_the_page_calls_no_shell_and_runs_no_text() -> None:
    for path in APP.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("eval", "exec", "os.system", "os.popen"), path
                assert not any(word.arg == "shell" for word in node.keywords), path


def test_recipes_suit_the_base_and_a_model_of_ones_own(tmp_path):
    from tests.tiny import save_tiny_base

    assert {preset.config.base.model for preset in train.recipes_for("embedded")} == {"embedded"}
    named = {
        "": train.SD15,
        "someone/realistic": train.SD15,
        "someone/juggernautXL": train.SDXL,
        "/nowhere": train.SD15,
    }
    named |= {
        "stabilityai/stable-diffusion-3.5-large": train.SD35M,
        "someone/stable-diffusion-2-1-base": train.SD21,
    }
    for own, base in named.items():
        assert {preset.config.base.model for preset in train.recipes_for(train.OWN, own)} == {
            base
        }, own
    for kind, base in {"sd1": train.SD15, "sd2": train.SD21, "sd35-medium": train.SD35M}.items():
        folder = save_tiny_base(tmp_path / f"xl-in-name-only-{kind}", kind=kind)
        assert train.recipes_for(train.OWN, str(folder))[0].config.base.model == base
    assert set(train.BASE_TITLES) == {base for _, base in train._base_choices()} - {train.OWN}

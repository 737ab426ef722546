"""The fields of `RunConfig` as widgets, and back. Label, help, bounds, choices and default all come from the field."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import gradio as gr
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from trainer import config
from trainer.config import RunConfig
from trainer.errors import ConfigError

LARGEST_BOUND_SHOWN = 4096
WORDS = {"lr": "LR", "snr": "SNR"}


@cache
def all_fields() -> dict[str, FieldInfo]:
    return dict(config.fields())


def label(path: str) -> str:
    """ "training.lr_schedule" -> "LR schedule"."""
    words = [WORDS.get(word, word) for word in path.rpartition(".")[2].split("_")]
    return " ".join([words[0][0].upper() + words[0][1:], *words[1:]])


def help_text(path: str) -> str:
    """The field's docstring, and its bounds where it has any."""
    field = all_fields()[path]
    return " ".join(filter(None, [field.description, _bounds(field)]))


def _bounds(field: FieldInfo) -> str:
    """ "(From 1 to 512.)"; nothing where there is no upper bound that anybody would reach."""
    limits = {
        name: getattr(bound, name)
        for bound in field.metadata
        for name in ("ge", "gt", "le", "lt")
        if hasattr(bound, name)
    }
    high = limits.get("le", limits.get("lt"))
    if high is None or high > LARGEST_BOUND_SHOWN:
        return ""
    low = (
        f"From {limits['ge']:g}"
        if "ge" in limits
        else f"Above {limits['gt']:g},"
        if "gt" in limits
        else "Up"
    )
    return f"({low} {'to' if 'le' in limits else 'to below'} {high:g}.)"


def widget(path: str, **look: Any) -> gr.components.Component:
    """The component for one field; `look` overrides its label, help, lines and so on."""
    field = all_fields()[path]
    default = to_widget(config.get(RunConfig(), path))
    common = {
        "value": default,
        "label": label(path),
        "info": help_text(path),
        "elem_id": "field-" + path.replace(".", "-"),
        "interactive": True,
        **look,
    }
    if choices := config.choices(field):
        return gr.Dropdown(list(choices), filterable=False, **common)
    if choices := config.several_choices(field):
        return gr.CheckboxGroup(
            list(choices), **{**common, "value": list(config.get(RunConfig(), path))}
        )
    if field.annotation is bool:
        return gr.Checkbox(**common)
    if field.annotation in (int, float):
        # Bounds are checked by `faults`, which names the field: the component's own check answers with a toast that does not.
        return gr.Number(
            precision=0 if field.annotation is int else None,
            step=1 if field.annotation is int else 0.01,
            **common,
        )
    if field.annotation is str:
        return gr.Textbox(**common)
    return gr.Textbox(**{"lines": 2, **common})  # several texts, one a line


def to_widget(value: Any) -> Any:
    return "\n".join(map(str, value)) if isinstance(value, tuple) else value


def to_widgets(changes: Mapping[str, Any]) -> dict[str, Any]:
    return {path: to_widget(value) for path, value in changes.items()}


def changed(run: RunConfig, recipe: RunConfig, paths: Sequence[str]) -> list[dict[str, str]]:
    """The fields that differ from the recipe, with both values as texts."""
    pairs = [(path, config.get(recipe, path), config.get(run, path)) for path in paths]
    return [
        {"path": path, "label": label(path), "was": shown(old), "now": shown(new)}
        for path, old, new in pairs
        if old != new
    ]


def shown(value: Any) -> str:
    """A value in a few characters."""
    if isinstance(value, bool):
        return "on" if value else "off"
    text = f"{value:g}" if isinstance(value, float) else str(to_widget(value))
    return text if len(text) <= 40 else text[:39] + "…"


def from_widget(path: str, value: Any) -> Any:
    """What the browser sent as what the field expects; left as it is where it does not fit, so that the check can name it."""
    field = all_fields()[path]
    if field.annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if field.annotation in (int, float, bool) or config.choices(field):
        return value
    if field.annotation is str:
        return value.strip() if isinstance(value, str) else ""
    if config.several_choices(field):
        return tuple(value) if isinstance(value, list | tuple) else value
    return tuple(line.strip() for line in str(value or "").splitlines() if line.strip())


def write(paths: Sequence[str], run: RunConfig) -> list[Any]:
    """The values of widgets that show this config."""
    values = {path: config.get(run, path) for path in paths}
    return [
        list(value) if config.several_choices(all_fields()[path]) else to_widget(value)
        for path, value in values.items()
    ]


def read(values: Mapping[str, Any]) -> RunConfig:
    """Widget values by path as a config. Raises ConfigError naming every fault."""
    return config.replace(
        RunConfig(), {path: from_widget(path, value) for path, value in values.items()}
    )


def faults(values: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with each field by itself, by path; contradictions between fields under ""."""
    found = {
        path: text
        for path, value in values.items()
        if (text := _fault(path, from_widget(path, value)))
    }
    if not found:
        try:
            read(values)
        except ConfigError as error:
            found[""] = str(error).partition("\n- ")[2] or str(error)
    return found


def _fault(path: str, value: Any) -> str:
    if value is None:
        return "Please give a value."
    try:
        _checker(path).validate_python(value)
    except ValidationError as error:
        return error.errors()[0]["msg"].removeprefix("Input ").capitalize() + "."
    return ""


@cache
def _checker(path: str) -> TypeAdapter:
    return TypeAdapter(all_fields()[path].rebuild_annotation())

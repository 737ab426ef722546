"""The fields of `RunConfig` as widgets, and their values back as settings.

Label, help, bounds, choices and default of a widget all come from its field.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypedDict

import gradio as gr
from pydantic.fields import FieldInfo

from trainer import config
from trainer.config import RunConfig
from trainer.errors import ConfigError

MAX_BOUND_SHOWN = 4096
"""Higher upper bounds are not shown: nobody would reach them."""

MAX_VALUE_LENGTH = 40


class Difference(TypedDict):
    """A setting with different values in two runs. The values are short texts."""

    path: str
    label: str
    was: str
    now: str


@cache
def all_fields() -> dict[str, FieldInfo]:
    """Returns every field by its dotted path, in the order of declaration."""
    return dict(config.fields())


def label(path: str) -> str:
    """Returns the label of a field: "LR scheduler" for "training.lr_schedule"."""
    return str(all_fields()[path].title)


def help_text(path: str) -> str:
    """Returns the help of a field, and its bounds if it has any."""
    field = all_fields()[path]
    return f"{field.description} {_bounds_text(field)}".strip()


def _bounds_text(field: FieldInfo) -> str:
    """Returns the bounds as "(From 1 to 512.)", or "" without a reachable upper bound."""
    bounds: dict[str, float] = {}
    for check in field.metadata:
        for name in ("ge", "gt", "le", "lt"):
            if hasattr(check, name):
                bounds[name] = getattr(check, name)
    high = bounds.get("le", bounds.get("lt"))
    if high is None or high > MAX_BOUND_SHOWN:
        return ""
    start = "Up"
    if "ge" in bounds:
        start = f"From {bounds['ge']:g}"
    elif "gt" in bounds:
        start = f"Above {bounds['gt']:g},"
    return f"({start} {'to' if 'le' in bounds else 'to below'} {high:g}.)"


def widget(path: str, **options: Any) -> gr.components.Component:
    """Returns the widget of a field. `options` override its label, help, lines and so on."""
    field = all_fields()[path]
    default = config.get(RunConfig(), path)
    common = {
        "value": to_widget(default),
        "label": label(path),
        "info": help_text(path),
        "elem_id": "field-" + path.replace(".", "-"),
        "interactive": True,
        **options,
    }
    if choices := config.choices(field):
        return gr.Dropdown(list(choices), filterable=False, **common)
    if several := config.several_choices(field):
        return gr.CheckboxGroup(list(several), **{**common, "value": list(default)})
    if field.annotation is bool:
        return gr.Checkbox(**common)
    # Bounds are checked by `errors`, whose message contains the label. The check of gr.Number shows
    # a message without it.
    if field.annotation is int:
        return gr.Number(precision=0, step=1, **common)
    if field.annotation is float:
        return gr.Number(precision=None, step=0.01, **common)
    if field.annotation is str:
        return gr.Textbox(**common)
    return gr.Textbox(**{"lines": 2, **common})  # a list of texts, one per line


def to_widget(value: Any) -> Any:
    """Returns a value as its widget shows it: a list of texts as lines."""
    return "\n".join(map(str, value)) if isinstance(value, tuple) else value


def to_widgets(changes: Mapping[str, Any]) -> dict[str, Any]:
    return {path: to_widget(value) for path, value in changes.items()}


def widget_values(paths: Sequence[str], run: RunConfig) -> list[Any]:
    """Returns the values of the widgets that show these settings of a run."""
    values = []
    for path in paths:
        value = config.get(run, path)
        takes_several = config.several_choices(all_fields()[path])
        values.append(list(value) if takes_several else to_widget(value))
    return values


def differences(run: RunConfig, other: RunConfig, paths: Sequence[str]) -> list[Difference]:
    """Returns the settings of a run whose values differ from another run or a preset."""
    rows: list[Difference] = []
    for path in paths:
        now, was = config.get(run, path), config.get(other, path)
        if now != was:
            rows.append(
                {
                    "path": path,
                    "label": label(path),
                    "was": short_text(was),
                    "now": short_text(now),
                }
            )
    return rows


def short_text(value: Any) -> str:
    """Returns a value in at most `MAX_VALUE_LENGTH` characters."""
    if isinstance(value, bool):
        return "on" if value else "off"
    text = f"{value:g}" if isinstance(value, float) else str(to_widget(value))
    return text if len(text) <= MAX_VALUE_LENGTH else text[: MAX_VALUE_LENGTH - 1] + "…"


def from_widget(path: str, value: Any) -> Any:
    """Returns a value from the browser in the type of its field.

    A value of the wrong type is returned unchanged, so that `errors` can report it.
    """
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


def read(values: Mapping[str, Any]) -> RunConfig:
    """Returns widget values by path as settings. Raises ConfigError with all errors."""
    changes = {path: from_widget(path, value) for path, value in values.items()}
    return config.replace(RunConfig(), changes)


def errors(values: Mapping[str, Any]) -> dict[str, str]:
    """Returns the error of each field by path, or else a contradiction of fields under ""."""
    messages = {}
    for path, value in values.items():
        if message := _field_error(path, from_widget(path, value)):
            messages[path] = message
    if messages:
        return messages
    try:
        read(values)
    except ConfigError as error:
        # The first line is about a file, and the others are the errors as a list.
        return {"": str(error).partition("\n- ")[2] or str(error)}
    return {}


def _field_error(path: str, value: Any) -> str:
    """Returns a sentence about what is wrong with a value, or ""."""
    if value is None:
        return "Please give a value."
    message = config.value_error(path, value).removeprefix("Input ")
    return message and message[0].upper() + message[1:] + "."

"""Translates settings by a table, and converts the values that several trainers share."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.errors import ConfigError

Changes = dict[str, Any]
"""New values by dotted path, such as {"training.steps": 300}."""

Rule = str | Callable[[Any], Changes]
"""How one setting is translated.

A dotted path takes the value unchanged. A function returns the changes; any exception in
`UNTRANSLATABLE` means that the value has no counterpart here.
"""

UNTRANSLATABLE = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)
OFF_VALUES: tuple[Any, ...] = (
    None, "", 0, False, "none", "None", "NONE", "OFF", "False", [], {},
)  # fmt: skip
"""Values that switch a setting off. An unsupported setting is not reported at these."""

OUTER_LAYERS = "training of the layers outside the blocks, such as conv_in and time_embedding"
"""Reported for programs that train more layers than any choice of `adapter.targets`."""


@dataclass(frozen=True)
class ForeignSettings:
    """The settings in a file of another trainer."""

    program: str
    changes: Changes = field(default_factory=dict)
    unsupported: list[str] = field(default_factory=list)
    """Each setting without a counterpart here, such as "network_args = conv_dim=4"."""


@dataclass(frozen=True)
class Table:
    """The settings of one program."""

    rules: Mapping[str, Rule]
    """Settings with a counterpart here, by their name there."""
    ignored: re.Pattern[str]
    """Names of settings about how that program works, such as its caches and folders."""
    neutral: Mapping[str, Any] = field(default_factory=dict)
    """Values at which an unsupported setting has no effect, so it need not be reported."""


def translate(table: Table, data: Mapping[str, Any]) -> tuple[Changes, list[str]]:
    """Returns the changes, and the settings that have no counterpart here."""
    changes: Changes = {}
    unsupported: list[str] = []
    for name, value in data.items():
        rule = table.rules.get(name)
        if rule is None:
            is_neutral = value in OFF_VALUES or table.neutral.get(name) == value
            if not is_neutral and not table.ignored.fullmatch(name):
                unsupported.append(setting_text(name, value))
            continue
        if value is None or value == "":
            continue
        try:
            changes |= {rule: value} if isinstance(rule, str) else rule(value)
        except UNTRANSLATABLE:
            unsupported.append(setting_text(name, value))
    return changes, unsupported


def names(text: str) -> re.Pattern[str]:
    """Compiles a pattern that matches any of the names, which are separated by blanks."""
    return re.compile("|".join(text.split()))


def setting_text(name: str, value: Any) -> str:
    """Returns a setting as one short line for a message: "lr_warmup = 10"."""
    return f"{name} = {str(value).strip()[:80]}"


def without_empty(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy without the settings that have no value."""
    return {name: value for name, value in data.items() if value is not None and value != ""}


def number_or_zero(data: Mapping[str, Any], name: str) -> float:
    """Returns a number that other settings depend on, or 0 if it is absent.

    Raises ConfigError if the value is not a number.
    """
    try:
        return float(data.get(name) or 0)
    except (ValueError, TypeError, OverflowError):
        raise ConfigError(
            f"{setting_text(name, data[name])} is not a number. Correct it in the file."
        ) from None


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"unet": {"train": True}} -> {"unet.train": True}."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# Rules that several programs share.

OPTIMIZERS = {
    "adamw": "adamw",
    "adam": "adamw",
    "adamw8bit": "adamw8bit",
    "adamw_8bit": "adamw8bit",
    "adafactor": "adafactor",
    "lion": "lion",
    "prodigy": "prodigy",
    "adamwschedulefree": "schedule_free_adamw",
    "schedule_free_adamw": "schedule_free_adamw",
}
SCHEDULES = {"constant", "linear", "cosine", "cosine_with_restarts", "polynomial"}
PRECISIONS = {
    "fp16": "fp16",
    "float16": "fp16",
    "float_16": "fp16",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "bfloat_16": "bf16",
    "fp32": "fp32",
    "float32": "fp32",
    "float": "fp32",
    "float_32": "fp32",
    "no": "fp32",
}


def number(path: str) -> Rule:
    return lambda value: {path: float(value)}


def whole_number(path: str) -> Rule:
    """Accepts "16" and 16.0 too."""
    return lambda value: {path: int(float(value))}


def precision(path: str) -> Rule:
    return lambda value: {path: PRECISIONS[value.lower()]}


def optimizer(value: str) -> Changes:
    return {"training.optimizer": OPTIMIZERS[value.lower()]}


def lr_schedule(value: str) -> Changes:
    name = value.lower().removesuffix("_with_warmup")
    if name not in SCHEDULES:
        raise ValueError(value)
    return {"training.lr_schedule": name}


def output_name(value: str) -> Changes:
    """Takes the name of the file from a path."""
    return {"name": re.split(r"[/\\]", value)[-1].removesuffix(".safetensors")[:80]}


def v_prediction(value: Any) -> Changes:
    return {"base.prediction": "v"} if value else {}


def zero_terminal_snr(value: Any) -> Changes:
    return {"base.zero_terminal_snr": "on"} if value else {}


def epochs(value: Any) -> Changes:
    """An epoch shows each image once (times the repeats of its folder), which is one view."""
    return {"training.views_per_picture": int(float(value)), "training.steps": 0}


def lokr_factor(value: Any) -> Changes:
    """-1 there is 0 here: the smallest adapter."""
    return {"adapter.lokr_factor": max(0, int(value))}


def layers(targets: str = "attention", pattern: str = "") -> Changes:
    """Returns the trained layers. All programs train every linear layer of a text encoder."""
    return {
        "adapter.targets": targets,
        "adapter.target_pattern": pattern,
        "adapter.text_encoder_targets": "all",
    }


def resolution(value: Any) -> Changes:
    """Takes "512,768" as one image size of that width and height."""
    return {"dataset.resolution": _square_side(value)}


def resolutions(value: Any) -> Changes:
    """Takes a list, or numbers separated by commas, as several resolutions.

    The largest becomes the main one.
    """
    parts = value if isinstance(value, list) else str(value).split(",")
    largest, *others = sorted({_square_side(part) for part in parts}, reverse=True)
    return {"dataset.resolution": largest, "dataset.resolutions": others}


def _square_side(value: Any) -> int:
    """Returns the side of the square with as many pixels: 624 for "512,768"."""
    sides = [int(side) for side in re.findall(r"\d+", str(value))]
    return round(math.sqrt(sides[0] * sides[-1]) / 8) * 8


def sample_prompts(value: Any) -> Changes:
    """Takes the prompts without the options of sd-scripts behind them ("--n ugly --w 512")."""
    if isinstance(value, str):
        lines = value.splitlines()
    else:
        lines = [line["prompt"] if isinstance(line, dict) else line for line in value]
    prompts = [re.split(r"\s--\w", line)[0].strip() for line in lines]
    if any(prompt.endswith((".txt", ".toml", ".json")) for prompt in prompts):
        raise ValueError("the prompts are in another file")
    written = [prompt for prompt in prompts if prompt and not prompt.startswith("#")]
    return {"sampling.prompts": written[:16]}

"""The scale of each module in PEFT's adapter settings."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import ModelError
from trainer.lora.formats.keys import DOTTED

CONFIG_LIMIT = 2**20  # bytes


PEFT_KINDS = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}  # how each spells its alpha


@dataclass(frozen=True)
class Scales:
    """Where the scale of a module stands when it stands beside the tensors: in PEFT's config."""

    alpha: float
    alphas: Mapping[str, float]
    """By the path of a module or its end."""
    rslora: bool

    def of(self, module: str, rank: int) -> float:
        alpha = next(
            (value for end, value in self.alphas.items() if f".{module}".endswith(f".{end}")),
            self.alpha,
        )
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _read_json(path: Path, text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise ModelError(
            f"The adapter settings in {path.name} are not valid JSON; the file is damaged."
        )
    return data


def _peft_scales(config: Path) -> Scales:
    if config.stat().st_size > CONFIG_LIMIT:
        raise ModelError(f"{config.name} is larger than any adapter's settings; it is damaged.")
    return _scales(config, _read_json(config, config.read_text(encoding="utf-8", errors="replace")))


def _scales(path: Path, data: Mapping[str, Any]) -> Scales:
    kind = data.get("peft_type", "LORA")
    if kind not in PEFT_KINDS:
        raise ModelError(
            f"{path.name} describes a {str(kind)[:40]}; read are {', '.join(PEFT_KINDS)}."
        )
    alpha, pattern = data.get(PEFT_KINDS[kind], 8), data.get("alpha_pattern") or {}
    if not isinstance(pattern, dict) or not all(
        _is_number(value) for value in (alpha, *pattern.values())
    ):
        raise ModelError(f"{path.name} gives an alpha that is no number; it is damaged.")
    alphas = {
        str(end).lstrip("^").rstrip("$").replace("\\.", ".").removeprefix("text_model."): value
        for end, value in pattern.items()
    }
    if any(re.search(r"[^\w.]", end) for end in alphas):
        raise ModelError(
            f"{path.name} gives alphas by regular expressions, which are not followed here; save it with plain names."
        )
    return Scales(alpha, alphas, bool(data.get("use_rslora")))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _diffusers_scales(path: Path, metadata: Mapping[str, str]) -> dict[str, Scales]:
    """What diffusers keeps of PEFT's config in the header, by component: {"unet.lora_alpha": 4, ...}."""
    if "lora_adapter_metadata" not in metadata:
        return {}
    data = _read_json(path, metadata["lora_adapter_metadata"])
    found = {
        part: {k.removeprefix(f"{part}."): v for k, v in data.items() if k.startswith(f"{part}.")}
        for part in DOTTED
    }
    return {part: _scales(path, values) for part, values in found.items() if values}

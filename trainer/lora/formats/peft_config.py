"""The scale of each module, read from PEFT's adapter settings.

PEFT writes them as a JSON file beside the tensors, diffusers as JSON in the header of the file.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import ModelError
from trainer.lora.formats.keys import COMPONENTS

MAX_CONFIG_BYTES = 2**20
ALPHA_NAMES = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
"""The name of the alpha by the kind of the adapter."""
DEFAULT_ALPHA = 8


@dataclass(frozen=True)
class Scales:
    """The alphas of an adapter whose file does not contain them as tensors."""

    alpha: float
    alphas: Mapping[str, float]
    """Exceptions, by the path of a module or the end of it."""
    rslora: bool

    def scale_of(self, module: str, rank: int) -> float:
        """Returns alpha / rank of a module, or alpha / sqrt(rank) for rsLoRA."""
        alpha = self.alpha
        for end, value in self.alphas.items():
            if f".{module}".endswith(f".{end}"):
                alpha = value
                break
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def scales_of_folder(config: Path) -> Scales:
    """Reads adapter_config.json. Raises ModelError if it is damaged or not supported."""
    if config.stat().st_size > MAX_CONFIG_BYTES:
        raise ModelError(
            f"{config.name} is larger than {MAX_CONFIG_BYTES // 1024} KiB, "
            "which no adapter's settings need. The file is damaged."
        )
    text = config.read_text(encoding="utf-8", errors="replace")
    return _scales(config, _read_json(config, text))


def scales_of_header(path: Path, metadata: Mapping[str, str]) -> dict[str, Scales]:
    """Reads the settings that diffusers writes to the header: {"unet.lora_alpha": 4, ...}.

    Returns them by component. Raises ModelError if they are damaged or not supported.
    """
    if "lora_adapter_metadata" not in metadata:
        return {}
    settings: dict[str, dict[str, Any]] = {}
    for name, value in _read_json(path, metadata["lora_adapter_metadata"]).items():
        component, _, key = name.partition(".")
        if component in COMPONENTS and key:
            settings.setdefault(component, {})[key] = value
    return {component: _scales(path, values) for component, values in settings.items()}


def _read_json(path: Path, text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise ModelError(
            f"The adapter settings in {path.name} are not valid JSON. The file is damaged."
        )
    return data


def _scales(path: Path, data: Mapping[str, Any]) -> Scales:
    kind = str(data.get("peft_type", "LORA"))
    if kind not in ALPHA_NAMES:
        raise ModelError(
            f"{path.name} is an adapter of the kind {kind[:40]}, which is not supported. "
            f"The supported kinds are {', '.join(ALPHA_NAMES)}."
        )
    alpha, pattern = data.get(ALPHA_NAMES[kind], DEFAULT_ALPHA), data.get("alpha_pattern") or {}
    numbers = [alpha, *pattern.values()] if isinstance(pattern, dict) else [None]
    if not all(_is_number(value) for value in numbers):
        raise ModelError(f"{path.name} contains an alpha that is not a number. It is damaged.")

    # PEFT treats each name as a regular expression. Only escaped plain names are read.
    alphas: dict[str, float] = {}
    for end, value in pattern.items():
        name = str(end).lstrip("^").rstrip("$").replace("\\.", ".").removeprefix("text_model.")
        if re.search(r"[^\w.]", name):
            raise ModelError(
                f"{path.name} selects alphas with the regular expression {name[:40]}, which is "
                "not supported. Save the adapter with plain module names."
            )
        alphas[name] = value
    return Scales(alpha, alphas, bool(data.get("use_rslora")))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

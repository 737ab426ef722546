"""The generation parameters that A1111 writes into an image.

A prompt, "Negative prompt: ...", and a last line "Steps: 20, Sampler: Euler a, CFG scale: 7, ...".
"""

import re
from collections.abc import Mapping
from typing import Any

from trainer.config.interop import translation
from trainer.config.interop.translation import ForeignSettings, Table, number, whole_number

TABLE = Table(
    rules={
        "Steps": whole_number("sampling.inference_steps"),
        "CFG scale": number("sampling.guidance_scale"),
        "Seed": whole_number("sampling.seed"),
        "Sampler": "sampling.sampler",
    },
    ignored=re.compile(".*"),
)


def matches(data: Mapping[str, Any]) -> bool:
    return isinstance(data.get("parameters"), str)


def read(data: Mapping[str, Any]) -> ForeignSettings:
    prompts, _, last_line = data["parameters"].rpartition("Steps: ")
    prompt, _, negative_prompt = prompts.partition("Negative prompt: ")
    parts = [part.split(": ", 1) for part in f"Steps: {last_line}".split(", ") if ": " in part]
    translated, unsupported = translation.translate(TABLE, dict(parts))
    changes = {
        "sampling.prompts": [prompt.strip()] if prompt.strip() else [],
        "sampling.negative_prompt": negative_prompt.strip(),
    }
    return ForeignSettings("the image", changes | translated, unsupported)

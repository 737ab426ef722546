"""A request for one sample. The page, the command line and scripts all use this declaration.

Works without torch.
"""

import json
from dataclasses import dataclass, field
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from trainer.config import Base
from trainer.errors import ModelError


@dataclass(frozen=True)
class StackedAdapter:
    """An adapter file and its strengths."""

    file: str
    strength: float = 1.0
    text_strength: float | None = None
    """In the text encoders. None: the same as `strength`."""


@dataclass(frozen=True)
class SampleRequest:
    """Everything that determines a sample, and the file to write.

    The same request always gives the same image.
    """

    prompt: str
    target: str = ""
    """Path of the PNG to write. It may be empty until the request is sent."""
    base: Base = Base()
    adapters: list[StackedAdapter] = field(default_factory=list)
    negative_prompt: str = ""
    seed: int = 1
    inference_steps: int = 20
    guidance_scale: float = 7.0
    width: int = 0
    """In pixels. 0: the size of the base."""
    height: int = 0
    sampler: str = "auto"
    """A name of `samplers.SAMPLERS`, or "auto" for the first one that suits the base."""
    caption_tokens: Literal[75, 150, 225] = 75
    """How many tokens of the prompts are read. Use the setting of the adapter's training."""

    def to_json(self) -> str:
        """Returns one line of JSON that `parse_request` reads, in ASCII."""
        return json.dumps(_SCHEMA.dump_python(self, mode="json"))


_SCHEMA = TypeAdapter(SampleRequest)


def parse_request(data: object) -> SampleRequest:
    """Returns the request in decoded JSON. Raises ModelError with the first invalid field."""
    try:
        request = _SCHEMA.validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise _invalid(name, first["msg"]) from None
    if not request.target:
        raise _invalid("target", "Field required")
    return request


def _invalid(name: str, reason: str) -> ModelError:
    return ModelError(f"The sample cannot be generated: {name}: {reason}.")

"""Reads a file of any supported trainer and applies it to a run."""

from collections.abc import Callable, Mapping
from typing import Any

from trainer.config import io, schema
from trainer.config.interop import (
    adapter_metadata,
    ai_toolkit,
    file_formats,
    image_parameters,
    kohya,
    onetrainer,
)
from trainer.config.interop.translation import ForeignSettings
from trainer.config.settings import RunConfig
from trainer.errors import ConfigError

Data = Mapping[str, Any]

READERS: tuple[tuple[Callable[[Data], bool], Callable[[Data], ForeignSettings]], ...] = (
    (ai_toolkit.matches, ai_toolkit.read),
    (onetrainer.matches, onetrainer.read),
    (adapter_metadata.matches, adapter_metadata.read),
    (image_parameters.matches, image_parameters.read),
    (kohya.matches, kohya.read),
)
"""The first reader whose `matches` accepts a file reads it."""


def read(text: str) -> ForeignSettings:
    """Translates the text of a settings file; the names in it decide which trainer wrote it.

    Raises ConfigError if no supported trainer writes such a file.
    """
    data = file_formats.parse(text)
    for matches, read_settings in READERS:
        if matches(data):
            return read_settings(data)
    raise ConfigError(
        "The file contains no settings of kohya_ss, sd-scripts, OneTrainer or ai-toolkit. "
        "Choose a settings file that one of them saved."
    )


def apply(foreign: ForeignSettings, run: RunConfig) -> tuple[RunConfig, list[str]]:
    """Returns the run with the changes, and every setting that could not be carried over.

    A value out of bounds is not carried over. Raises ConfigError if the values contradict each
    other.
    """
    unsupported = list(foreign.unsupported)
    changes = {}
    for path, value in foreign.changes.items():
        if schema.value_error(path, value):
            unsupported.append(f"{path} = {value}")
        else:
            changes[path] = value
    try:
        return io.replace(run, changes), unsupported
    except ConfigError as error:
        raise ConfigError(
            f"The settings from {foreign.program} do not fit together. {error}"
        ) from None

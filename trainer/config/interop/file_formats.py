"""Parses the text of a settings file: JSON, TOML or YAML."""

import json
import tomllib
from typing import Any

import yaml

from trainer.errors import ConfigError

MAX_CHARACTERS = 1_000_000


class _YamlWithoutAliases(yaml.SafeLoader):
    """A YAML loader that refuses aliases.

    Nested aliases expand exponentially, so a file of a few hundred bytes could fill the memory.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ConfigError(
                "The file repeats parts of itself with YAML aliases (*name), which are not "
                "supported. Write the repeated parts out."
            )
        return super().compose_node(parent, index)


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, _YamlWithoutAliases)


def parse(text: str) -> dict[str, Any]:
    """Returns the table in the text. Raises ConfigError if there is none, or if it is too long."""
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(
            f"The file has {len(text):,} characters, too many for settings "
            f"(at most {MAX_CHARACTERS:,}). Choose a settings file."
        )
    for parse_format in (json.loads, tomllib.loads, _parse_yaml):
        try:
            data = parse_format(text)
        except (ValueError, yaml.YAMLError, RecursionError):
            continue
        if isinstance(data, dict):
            return data
    raise ConfigError("The file is neither JSON nor TOML nor YAML. Choose a settings file.")

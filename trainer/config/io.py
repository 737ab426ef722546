"""Settings in files and on the command line: TOML, plain data, `--set`, and the fingerprint.

A file contains settings only, no derived value, and survives the round trip unchanged:
`parse(to_toml(run)) == run`.
"""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import ValidationError

from trainer.config import schema
from trainer.config.settings import RunConfig
from trainer.errors import ConfigError

NUMBERS_UNAFFECTED: dict[str, bool | set[str]] = {
    "name": True,
    "preset": True,
    "sampling": True,
    "saving": True,
    "dataset": {"folder", "regularisation_folder"},
    "training": {"devices"},
}
"""Settings that do not change the numbers of a training."""


def load(path: Path) -> RunConfig:
    """Reads a run.toml or a preset.

    Raises ConfigError with the name of the file and all its errors.
    """
    try:
        return parse(path.read_text(encoding="utf-8-sig"), str(path))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a TOML file: {error}.") from None


def parse(text: str, source: str = "the file") -> RunConfig:
    """Reads the text of a run.toml or a preset. Raises ConfigError with all its errors."""
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{source} is not a TOML file: {error}.") from None
    data.pop("about", None)  # the description of a preset
    return from_dict(data, source=f"settings in {source}")


def to_toml(config: RunConfig) -> str:
    """Returns the settings as TOML, each below its help as a comment."""
    document = tomlkit.document()
    container: Any = document
    section = ""
    for path, field in schema.fields():
        head, _, name = path.rpartition(".")
        if head != section:
            container = document.setdefault(head, tomlkit.table())
            section = head
        container.add(tomlkit.comment(field.description or ""))
        value = schema.get(config, path)
        container.add(name, list(value) if isinstance(value, tuple) else value)
    return tomlkit.dumps(document)


def from_dict(data: Mapping[str, Any], source: str = "settings") -> RunConfig:
    """Checks plain data and returns it as settings.

    Raises ConfigError with all errors, each with its dotted path and the allowed values.
    """
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        messages = "\n".join(f"- {_error_line(details)}" for details in error.errors())
        raise ConfigError(f"The {source} cannot be used:\n{messages}") from None


def _error_line(details: Mapping[str, Any]) -> str:
    """Returns one of pydantic's errors as a line that begins with the path of the setting."""
    message = schema.plain_message(details["msg"])
    path = ".".join(map(str, details["loc"]))
    if not path:  # a broken rule, whose message contains the paths
        return message
    if details["type"] == "extra_forbidden":
        return f"{path}: there is no such setting"
    if details["type"] == "missing":
        return f"{path}: {message}"
    return f"{path}: {message} (got {details['input']!r:.80})"


def replace(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Returns the settings with new values by dotted path.

    Raises ConfigError with every unknown path, or with every value that is not allowed.
    """
    known = dict(schema.fields())
    unknown = [path for path in changes if path not in known]
    if unknown:
        raise ConfigError(
            f"There is no setting named {', '.join(unknown)}. "
            "`python -m trainer train --help` lists all settings."
        )
    data = config.model_dump()
    for path, value in changes.items():
        section, _, name = path.rpartition(".")
        (data[section] if section else data)[name] = value
    return from_dict(data)


def parse_setting(text: str) -> tuple[str, Any]:
    """ "training.steps=300" -> ("training.steps", 300).

    The value is read as TOML, or as plain text if it is not valid TOML.
    """
    path, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set takes key=value, for example training.steps=300; got {text!r}.")
    try:
        return path.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return path.strip(), value


def fingerprint(config: RunConfig) -> str:
    """Returns the sha256 of every setting that affects the numbers of a training.

    Two runs with one fingerprint give the same adapter, so a checkpoint of one can be resumed
    with the other. Defaults are left out: a later version with new settings then gives the same
    fingerprint, and old runs stay resumable.
    """
    data = config.model_dump(mode="json", exclude_defaults=True, exclude=NUMBERS_UNAFFECTED)
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

"""Reading and writing settings."""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import ValidationError

from trainer.config.schema import fields, get
from trainer.config.settings import RunConfig
from trainer.errors import ConfigError


def replace(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """A config with some values changed, by dotted path. Raises ConfigError naming every fault at once."""
    data = config.model_dump()
    unknown = [path for path in changes if path not in dict(fields())]
    if unknown:
        raise ConfigError(
            "There is no setting named "
            + ", ".join(unknown)
            + ". `python -m trainer train --help` lists them all."
        )
    for path, value in changes.items():
        *section, name = path.split(".")
        (data[section[0]] if section else data)[name] = value
    return from_dict(data)


def parse_setting(text: str) -> tuple[str, Any]:
    """ "training.steps=300" -> ("training.steps", 300). The value is read as TOML, and as plain text where it is none."""
    path, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set takes key=value, for example training.steps=300; got {text!r}.")
    try:
        return path.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return path.strip(), value


def from_dict(data: Mapping[str, Any], source: str = "settings") -> RunConfig:
    """Checks plain data. Raises ConfigError that names every fault by its dotted path, with what is allowed."""
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        faults = "\n".join("- " + _fault(e) for e in error.errors())
        raise ConfigError(f"The {source} cannot be used:\n{faults}") from None


def _fault(error: Mapping[str, Any]) -> str:
    path = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{path}: there is no such setting"
    given = "" if not path or error["type"] == "missing" else f" (got {error['input']!r:.80})"
    return f"{path}: {error['msg']}{given}" if path else error["msg"].removeprefix("Value error, ")


def load(path: Path) -> RunConfig:
    """Reads a run.toml or a preset. Raises ConfigError with the file's name and every fault in it."""
    try:
        return parse(path.read_text(encoding="utf-8-sig"), str(path))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a TOML file: {error}.") from None


def parse(text: str, source: str = "the file") -> RunConfig:
    """A config from the text of a run.toml or a preset. Raises ConfigError with every fault in it."""
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{source} is not a TOML file: {error}.") from None
    data.pop("about", None)  # a preset's own description
    return from_dict(data, source=f"settings in {source}")


def to_toml(config: RunConfig) -> str:
    """The config as TOML, each value under its help."""
    document = tomlkit.document()
    container: Any = document
    section = ""
    for path, field in fields():
        head, _, name = path.rpartition(".")
        if head != section:
            container = document.setdefault(head, tomlkit.table())
            section = head
        container.add(tomlkit.comment((field.description or "").replace("\n", " ")))
        value = get(config, path)
        container.add(name, list(value) if isinstance(value, tuple) else value)
    return tomlkit.dumps(document)


def fingerprint(config: RunConfig) -> str:
    """Sha256 of everything that alters the numbers: the same for two runs that must give the same adapter.

    Defaults are left out, so that a run which waits to be resumed outlives a version that brings new settings.
    """
    data = config.model_dump(
        mode="json",
        exclude_defaults=True,
        exclude={
            "name": True,
            "preset": True,
            "sampling": True,
            "saving": True,
            "dataset": {"folder", "regularisation_folder"},
            "training": {"devices"},
        },
    )
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

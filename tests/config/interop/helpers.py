"""Reads the text of a foreign file as a test does."""

import json
from typing import Any

from trainer import config
from trainer.config import RunConfig, interop


def carry_over(data: dict[str, Any] | str) -> tuple[RunConfig, list[str]]:
    """Applies a file to a fresh form. Returns the run, and what could not be carried over."""
    text = data if isinstance(data, str) else json.dumps(data)
    return interop.apply(interop.read(text), RunConfig())


def values(run: RunConfig, paths: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of a run at these paths, to compare them with the expected ones."""
    return {path: config.get(run, path) for path in paths}


def carry_over_to(data: dict[str, Any], form: dict[str, Any]) -> RunConfig:
    """Applies a file to a form with other values than a fresh one."""
    run = config.replace(RunConfig(), form)
    return interop.apply(interop.read(json.dumps(data)), run)[0]

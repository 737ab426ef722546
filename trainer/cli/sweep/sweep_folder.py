"""The folder of a sweep, and the settings of its runs.

    outputs/sweeps/2026-11-23-maya/
      run.toml       the settings that all runs share
      sweep.json     the grid, and the names of the run folders
      results.md     a table with the settings that differ and the results
      results.svg    the validation loss of every run over its steps

The runs are ordinary run folders, so the page can show, compare and repeat them.
"""

import itertools
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer import config
from trainer.config import RunConfig
from trainer.errors import ConfigError, StateError
from trainer.runs import run_folder
from trainer.runs.atomic_files import atomic_write

MAX_RUNS = 500
MAX_NAME_LENGTH = 80
"""The limit of `RunConfig.name`."""

Grid = Sequence[tuple[str, list[Any]]]
"""Paths of settings, each with its values."""


def parse_grid(text: str) -> tuple[str, list[Any]]:
    """Returns the path and the values in "adapter.rank=8,16".

    The values are read as TOML, or as plain words if they are not TOML. Raises ConfigError if
    the path or the values are missing.
    """
    path, equals, values = (part.strip() for part in text.partition("="))
    if not equals or not values:
        raise ConfigError(
            f"--grid takes key=value,value, for example adapter.rank=8,16; got {text!r}."
        )
    try:
        parsed = tomllib.loads(f"values = [{values}]")["values"]
        return path, list(dict.fromkeys(parsed))
    # A TypeError means that a value is a list, which cannot be a key of a dict.
    except (tomllib.TOMLDecodeError, TypeError):
        return path, list(dict.fromkeys(value.strip() for value in values.split(",")))


def combinations(run: RunConfig, grid: Grid) -> list[RunConfig]:
    """Returns the settings of every combination, each with a name that describes it.

    Raises ConfigError if a combination is invalid or if there are more than MAX_RUNS.
    """
    paths = [path for path, _ in grid]
    for path in paths:
        if paths.count(path) > 1:
            raise ConfigError(f"--grid contains {path} twice. Give all its values at once.")
    runs: list[RunConfig] = []
    for values in itertools.product(*(values for _, values in grid)):
        if len(runs) == MAX_RUNS:
            raise ConfigError(
                f"These settings have more than {MAX_RUNS} combinations. Leave some values out."
            )
        chosen = dict(zip(paths, values, strict=True))
        name = _name(run.name, chosen, number=len(runs) + 1)
        try:
            runs.append(config.replace(run, {"name": name} | chosen))
        except ConfigError as error:
            settings = ", ".join(f"{path} = {value}" for path, value in chosen.items())
            raise ConfigError(f"With {settings}: {error}") from None
    return runs


def _name(sweep: str, chosen: dict[str, Any], number: int) -> str:
    """Returns "maya rank=8 kind=dora", or "maya 012" if that is too long."""
    settings = [f"{path.rpartition('.')[2]}={value}" for path, value in chosen.items()]
    name = " ".join([sweep, *settings])
    if len(name) <= MAX_NAME_LENGTH:
        return name
    return f"{sweep[: MAX_NAME_LENGTH - 5]} {number:03d}"


def create(run: RunConfig, grid: Grid) -> Path:
    """Creates the folder of a sweep and all its run folders, and returns the former."""
    runs = [run_folder.create(each) for each in combinations(run, grid)]
    folder = run_folder.create(run, run_folder.outputs_folder() / "sweeps")
    content = {"grid": dict(grid), "runs": [each.name for each in runs]}
    atomic_write(folder / "sweep.json", json.dumps(content, indent=1, ensure_ascii=False))
    return folder


def read(folder: Path) -> tuple[list[str], list[Path]]:
    """Returns the paths of the settings that differ, and the run folders that still exist.

    Raises StateError if the folder is not a sweep.
    """
    try:
        content = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
        paths = list(content["grid"])
        # Only the last part of a name counts, so that it cannot lead out of the runs folder.
        names = [Path(name).name for name in content["runs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(
            f"{folder} is not a sweep: cannot read its sweep.json ({error})."
        ) from None
    parent = folder.resolve().parents[1] / "runs"
    return paths, [parent / name for name in names if (parent / name / "run.toml").is_file()]

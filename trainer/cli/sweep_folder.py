"""A sweep: one run for every combination of some settings, and a table and a plot of what came out.

    outputs/sweeps/2026-11-23-maya/
      sweep.json     the grid, and the names of its run folders
      results.md     the settings that differ, the validation loss, the seconds
      results.svg    the validation loss of every run over its steps

The runs are ordinary run folders: the page shows, compares and repeats them like any other.
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

MOST_RUNS = 500
NAME_LENGTH = 80  # of RunConfig.name


def parse_grid(text: str) -> tuple[str, list[Any]]:
    """ "adapter.rank=8,16" -> ("adapter.rank", [8, 16]). Values are read as TOML, and as plain texts where they are none."""
    path, equals, values = (part.strip() for part in text.partition("="))
    if not equals or not values:
        raise ConfigError(
            f"--grid takes key=value,value, for example adapter.rank=8,16; got {text!r}."
        )
    try:
        return path, list(dict.fromkeys(tomllib.loads(f"values = [{values}]")["values"]))
    except (tomllib.TOMLDecodeError, TypeError):  # words, or lists, which no dict takes
        return path, list(dict.fromkeys(value.strip() for value in values.split(",")))


def combinations(run: RunConfig, grid: Sequence[tuple[str, list[Any]]]) -> list[RunConfig]:
    """A config for each combination, named after it. Raises ConfigError for the first that cannot be, before anything is made."""
    paths = [path for path, _ in grid]
    if len(set(paths)) < len(paths):
        raise ConfigError(
            f"--grid names {next(path for path in paths if paths.count(path) > 1)} twice; give all its values at once."
        )
    found: list[RunConfig] = []
    for values in itertools.product(*(values for _, values in grid)):
        if len(found) == MOST_RUNS:
            raise ConfigError(
                f"These settings have more than {MOST_RUNS} combinations; leave some values out."
            )
        chosen = dict(zip(paths, values, strict=True))
        says = " ".join(
            [run.name, *(f"{path.rpartition('.')[2]}={value}" for path, value in chosen.items())]
        )
        name = (
            says
            if len(says) <= NAME_LENGTH
            else f"{run.name[: NAME_LENGTH - 5]} {len(found) + 1:03d}"
        )
        try:
            found.append(config.replace(run, {"name": name} | chosen))
        except ConfigError as error:
            raise ConfigError(
                f"With {', '.join(f'{path} = {value}' for path, value in chosen.items())}: {error}"
            ) from None
    return found


def create(run: RunConfig, grid: Sequence[tuple[str, list[Any]]]) -> Path:
    """Makes all run folders, and the folder of the sweep."""
    folders = [run_folder.create(each) for each in combinations(run, grid)]
    folder = run_folder.create(
        run, run_folder.outputs_folder() / "sweeps"
    )  # a run.toml of its own: what they all have in common
    said = {"grid": dict(grid), "runs": [each.name for each in folders]}
    atomic_write(folder / "sweep.json", json.dumps(said, indent=1, ensure_ascii=False))
    return folder


def read(folder: Path) -> tuple[list[str], list[Path]]:
    """The settings that differ, and the run folders that are still there. Raises StateError for what is no sweep."""
    try:
        said = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
        paths, names = list(said["grid"]), [Path(name).name for name in said["runs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(
            f"{folder} is no sweep: it has no readable sweep.json ({error})."
        ) from None
    runs = folder.resolve().parents[1] / "runs"
    return paths, [runs / name for name in names if (runs / name / "run.toml").is_file()]

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
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from trainer import config
from trainer.config import RunConfig
from trainer.errors import ConfigError, StateError
from trainer.runs import run_folder, run_requests, run_status
from trainer.runs.atomic_files import atomic_write

MOST_RUNS = 500
NAME_LENGTH = 80  # of RunConfig.name
COLOURS = (
    "#4e79a7",
    "#f28e2b",
    "#e15759",
    "#76b7b2",
    "#59a14f",
    "#edc948",
    "#b07aa1",
    "#ff9da7",
    "#9c755f",
    "#79706e",
)
DASHES = ("", "6 3", "2 2", "8 3 2 3")


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


def train(folder: Path, run_in: Callable[[Path], int], stopped: int) -> int:
    """Trains one after the other what is not finished, and writes the results after each. Goes on after a failure; ends when stopped."""
    code = 0
    for run in read(folder)[1]:
        if run_status.read_status(run).state in ("new", "queued", "stopped", "interrupted", "failed"):
            ended = run_in(run)
            write_results(folder)
            if ended == stopped:
                return stopped
            code = ended or code
    write_results(folder)
    return code


def leave_in_queue(folder: Path) -> None:
    """For the page, which trains them in this order when the device is free."""
    for run in read(folder)[1]:
        if run_status.read_status(run).state == "new":
            run_requests.request(run, "queued")


def rows(folder: Path) -> list[dict[str, Any]]:
    """What came out of each run; the lowest validation loss first, those without one last."""
    paths, runs = read(folder)
    found = []
    for run in runs:
        settings, status = config.load(run / "run.toml"), run_status.read_status(run)
        losses = dict(status.validation)
        found.append(
            {
                "run": run.name,
                "settings": {path: config.get(settings, path) for path in paths},
                "state": status.state,
                "validation_loss": status.validation[-1][1] if status.validation else None,
                "best_step": status.best_step,
                "best_loss": None if status.best_step is None else losses.get(status.best_step),
                "seconds": status.finished.seconds if status.finished else None,
                "curve": status.validation,
            }
        )
    return sorted(
        found,
        key=lambda row: (
            row["state"] != "finished",
            row["validation_loss"] is None,
            row["validation_loss"],
        ),
    )


def write_results(folder: Path) -> str:
    """results.md and results.svg; returns the table."""
    found, paths = rows(folder), read(folder)[0]
    table = "\n".join(_table(found, paths))
    atomic_write(
        folder / "results.md",
        f"# {folder.name}\n\n{table}\n\n![Validation loss over the steps](results.svg)\n",
    )
    atomic_write(folder / "results.svg", plot(found))
    return table


def _table(found: Sequence[Mapping[str, Any]], paths: Sequence[str]) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    columns = ["validation loss", "of the best save", "at step", "seconds", "state", "run"]
    lines = [f"| {' | '.join([*paths, *columns])} |", f"|{'---|' * (len(paths) + len(columns))}"]
    for row in found:
        values = [str(row["settings"][path]) for path in paths]
        results = [
            number(row["validation_loss"], ".4f"),
            number(row["best_loss"], ".4f"),
            str(row["best_step"] or ""),
        ]
        lines.append(
            f"| {' | '.join([*values, *results, number(row['seconds'], '.0f'), row['state'], row['run']])} |"
        )
    return lines


def plot(found: Sequence[Mapping[str, Any]]) -> str:
    """The validation loss of every run over its steps, as an SVG; the legend has the order of the table."""
    curves = [(row, row["curve"]) for row in found if len(row["curve"]) > 1]
    points = [point for _, curve in curves for point in curve]
    width, height, left, bottom, line = 640, 360, 60, 40, 18
    right = max([int(7 * len(_label(row))) for row, _ in curves], default=0) + 60
    low, high = (
        min((loss for _, loss in points), default=0.0),
        max((loss for _, loss in points), default=1.0),
    )
    steps = max((step for step, _ in points), default=1) or 1

    def place(step: float, loss: float) -> str:
        y = (height - bottom) - (loss - low) / ((high - low) or 1) * (height - bottom - 20)
        return f"{left + step / steps * (width - left):.1f},{y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + right}" height="{max(height, 40 + line * len(curves))}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<path d="M{left},20V{height - bottom}H{width}" fill="none" stroke="#888"/>',
        f'<text x="4" y="24">{high:.4f}</text><text x="4" y="{height - bottom}">{low:.4f}</text>',
        f'<text x="{left}" y="{height - 18}">0</text><text x="{width}" y="{height - 18}" text-anchor="end">{steps} steps</text>',
    ]
    for index, (row, curve) in enumerate(curves):
        look = f'stroke="{COLOURS[index % len(COLOURS)]}" stroke-width="2" stroke-dasharray="{DASHES[index // len(COLOURS) % len(DASHES)]}"'
        y = 24 + line * index
        parts.append(
            f'<polyline points="{" ".join(place(*point) for point in curve)}" fill="none" {look}/>'
        )
        parts.append(
            f'<path d="M{width + 12},{y}h24" {look}/><text x="{width + 42}" y="{y + 4}">{escape(_label(row))}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def _label(row: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{path.rpartition('.')[2]} {value}" for path, value in row["settings"].items()
    )

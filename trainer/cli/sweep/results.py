"""The results of a sweep: a table and a plot."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from trainer import config
from trainer.cli.sweep import sweep_folder
from trainer.runs import run_status
from trainer.runs.atomic_files import atomic_write

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
COLUMNS = ("validation loss", "of the best save", "at step", "seconds", "state", "run")

# The layout of the plot, in pixels.
WIDTH, HEIGHT = 640, 360
LEFT, TOP, BOTTOM = 60, 20, 40
LEGEND_LINE = 18
CHARACTER_WIDTH = 7


@dataclass(frozen=True)
class Row:
    """The result of one run."""

    run: str
    settings: dict[str, Any]
    """The settings that differ, by path."""
    state: str
    validation_loss: float | None
    """Of the last validation."""
    best_step: int | None
    best_loss: float | None
    seconds: float | None
    curve: list[tuple[int, float]]
    """(step, validation loss) pairs."""

    @property
    def label(self) -> str:
        """The settings in a line, such as "rank 8, kind dora"."""
        settings = [f"{path.rpartition('.')[2]} {value}" for path, value in self.settings.items()]
        return ", ".join(settings)


def read_rows(folder: Path) -> list[Row]:
    """Returns the results of all runs: finished runs first, then by validation loss."""
    paths, runs = sweep_folder.read(folder)
    rows = [_read_row(run, paths) for run in runs]
    return sorted(
        rows,
        key=lambda row: (
            row.state != "finished",
            row.validation_loss is None,
            row.validation_loss or 0.0,
        ),
    )


def _read_row(run: Path, paths: Sequence[str]) -> Row:
    settings = config.load(run / "run.toml")
    status = run_status.read_status(run)
    curve = status.validation_losses
    best_step = status.best_step
    return Row(
        run=run.name,
        settings={path: config.get(settings, path) for path in paths},
        state=status.state,
        validation_loss=curve[-1][1] if curve else None,
        best_step=best_step,
        best_loss=None if best_step is None else dict(curve).get(best_step),
        seconds=status.finished.seconds if status.finished else None,
        curve=curve,
    )


def write_results(folder: Path) -> str:
    """Writes results.md and results.svg, and returns the table."""
    rows = read_rows(folder)
    paths, _ = sweep_folder.read(folder)
    table = draw_table(rows, paths)
    atomic_write(
        folder / "results.md",
        f"# {folder.name}\n\n{table}\n\n![Validation loss over the steps](results.svg)\n",
    )
    atomic_write(folder / "results.svg", draw_plot(rows))
    return table


def draw_table(rows: Sequence[Row], paths: Sequence[str]) -> str:
    """Returns the results as a table in Markdown."""
    header = [*paths, *COLUMNS]
    lines = [_table_line(header), f"|{'---|' * len(header)}"]
    for row in rows:
        results = [
            _number(row.validation_loss, ".4f"),
            _number(row.best_loss, ".4f"),
            str(row.best_step or ""),
            _number(row.seconds, ".0f"),
        ]
        settings = [str(row.settings[path]) for path in paths]
        lines.append(_table_line([*settings, *results, row.state, row.run]))
    return "\n".join(lines)


def _table_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def draw_plot(rows: Sequence[Row]) -> str:
    """Returns the validation losses over the steps as an SVG, with a legend in table order."""
    rows = [row for row in rows if len(row.curve) > 1]
    points = list(itertools.chain.from_iterable(row.curve for row in rows))
    low = min((loss for _, loss in points), default=0.0)
    high = max((loss for _, loss in points), default=1.0)
    steps = max((step for step, _ in points), default=1) or 1
    axis = HEIGHT - BOTTOM

    def position(step: float, loss: float) -> str:
        x = LEFT + step / steps * (WIDTH - LEFT)
        y = axis - (loss - low) / ((high - low) or 1) * (axis - TOP)
        return f"{x:.1f},{y:.1f}"

    legend_width = CHARACTER_WIDTH * max((len(row.label) for row in rows), default=0) + 60
    parts = [
        _svg_start(WIDTH + legend_width, max(HEIGHT, 40 + LEGEND_LINE * len(rows))),
        f'<path d="M{LEFT},{TOP}V{axis}H{WIDTH}" fill="none" stroke="#888"/>',
        f'<text x="4" y="24">{high:.4f}</text><text x="4" y="{axis}">{low:.4f}</text>',
        f'<text x="{LEFT}" y="{HEIGHT - 18}">0</text>',
        f'<text x="{WIDTH}" y="{HEIGHT - 18}" text-anchor="end">{steps} steps</text>',
    ]
    for index, row in enumerate(rows):
        line = " ".join(position(*point) for point in row.curve)
        parts.append(f'<polyline points="{line}" fill="none" {_stroke(index)}/>')
        y = 24 + LEGEND_LINE * index
        parts.append(f'<path d="M{WIDTH + 12},{y}h24" {_stroke(index)}/>')
        parts.append(f'<text x="{WIDTH + 42}" y="{y + 4}">{escape(row.label)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _svg_start(width: int, height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    )


def _stroke(index: int) -> str:
    """Returns the look of a curve. Curves with the same colour differ in their dashes."""
    colour = COLOURS[index % len(COLOURS)]
    dashes = DASHES[index // len(COLOURS) % len(DASHES)]
    return f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"'

"""What came out of a sweep: a table and a plot."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from trainer import config
from trainer.cli.sweep_folder import read
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


def rows(folder: Path) -> list[dict[str, Any]]:
    """What came out of each run; the lowest validation loss first, those without one last."""
    paths, runs = read(folder)
    found = []
    for run in runs:
        settings, status = config.load(run / "run.toml"), run_status.read_status(run)
        losses = dict(status.validation_losses)
        found.append(
            {
                "run": run.name,
                "settings": {path: config.get(settings, path) for path in paths},
                "state": status.state,
                "validation_loss": status.validation_losses[-1][1] if status.validation_losses else None,
                "best_step": status.best_step,
                "best_loss": None if status.best_step is None else losses.get(status.best_step),
                "seconds": status.finished.seconds if status.finished else None,
                "curve": status.validation_losses,
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

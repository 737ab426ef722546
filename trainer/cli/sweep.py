"""The command that trains every combination of some settings: sweep."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.cli.run_options import add_run_options, read_run
from trainer.cli.sweep_folder import create, parse_grid, read
from trainer.cli.sweep_results import write_results
from trainer.errors import ConfigError
from trainer.runs import run_requests, run_status
from trainer.training import launch


def add_commands(commands: Any) -> None:
    grid = commands.add_parser(
        "sweep",
        help="train every combination of some settings, and compare what comes out",
        description="Makes a run for each combination and trains them one after the other; a table and a plot say what came out. "
        "With the folder of a sweep: trains what is left of it, and writes both anew.",
    )
    add_run_options(grid, "RUN.toml|PRESET|SWEEP_DIR")
    grid.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=VALUE,VALUE",
        help="a setting and its values, as often as wanted",
    )
    grid.add_argument("--name", help="name of the sweep, with which the names of its runs begin")
    grid.add_argument(
        "--queue",
        action="store_true",
        help="leave the training to the page: the runs wait in its queue",
    )
    grid.set_defaults(command=sweep_command)


def sweep_command(options: argparse.Namespace) -> int:
    if launch.is_one_of_several():
        raise ConfigError(
            "A sweep starts its runs itself: set training.devices, and start it without torchrun."
        )
    if (Path(options.recipe) / "sweep.json").is_file():
        if options.grid or options.settings or options.dataset or options.name:
            raise ConfigError(
                f"{options.recipe} is a sweep whose settings are made; start a new one from a preset or a run.toml."
            )
        folder = Path(options.recipe)
    elif not options.grid:
        raise ConfigError(
            "Which settings? Give --grid KEY=VALUE,VALUE, for example --grid adapter.rank=8,16."
        )
    else:
        folder = create(read_run(options), [parse_grid(text) for text in options.grid])
    if options.queue:
        leave_in_queue(folder)
        print(
            f"The runs wait in the page's queue. When they are done: python -m trainer sweep {folder}"
        )
        return 0
    from trainer.training.runner import STOPPED, run_in

    code = train(folder, run_in, STOPPED)
    print(f"\n{write_results(folder)}\n\n{folder / 'results.md'}")
    return code


def train(folder: Path, run_in: Callable[[Path], int], stopped: int) -> int:
    """Trains one after the other what is not finished, and writes the results after each. Goes on after a failure; ends when stopped."""
    code = 0
    for run in read(folder)[1]:
        if run_status.read_status(run).state in (
            "new",
            "queued",
            "stopped",
            "interrupted",
            "failed",
        ):
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

"""The command that trains every combination of some settings: sweep."""

import argparse
from collections.abc import Callable
from pathlib import Path

from trainer.cli.run_options import Commands, add_run_options, read_run
from trainer.cli.sweep import sweep_folder
from trainer.cli.sweep.results import write_results
from trainer.errors import ConfigError
from trainer.runs import run_requests, run_status
from trainer.training import launch
from trainer.training.runner import STOPPED, run_in

NOT_FINISHED = ("new", "queued", "stopped", "interrupted", "failed")


def add_commands(commands: Commands) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="train every combination of some settings, and compare the results",
        description="Creates a run for each combination, trains them one after the other, and "
        "writes a table and a plot of the results. If the argument is the folder of a sweep, "
        "trains the runs that are not finished and updates both.",
    )
    add_run_options(sweep, "RUN.toml|PRESET|SWEEP_DIR")
    sweep.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=VALUE,VALUE",
        help="a setting and its values; can be repeated",
    )
    sweep.add_argument("--name", help="name of the sweep, and start of the names of its runs")
    sweep.add_argument(
        "--queue", action="store_true", help="queue the runs for the page instead of training them"
    )
    sweep.set_defaults(command=sweep_command)


def sweep_command(options: argparse.Namespace) -> int:
    if launch.is_one_of_several():
        raise ConfigError(
            "A sweep starts the processes of its runs itself. "
            "Set training.devices, and do not use torchrun."
        )
    folder = _open_sweep(options)
    if options.queue:
        queue_runs(folder)
        print(
            "The runs wait in the page's queue. "
            f"When they are done: python -m trainer sweep {folder}"
        )
        return 0
    code = train(folder, run_in, STOPPED)
    print(f"\n{write_results(folder)}\n\n{folder / 'results.md'}")
    return code


def _open_sweep(options: argparse.Namespace) -> Path:
    """Returns the folder of an existing sweep, or of a new one."""
    folder = Path(options.source)
    if (folder / "sweep.json").is_file():
        if options.grid or options.settings or options.dataset or options.name:
            raise ConfigError(
                f"{folder} is a sweep, whose settings are fixed. "
                "Start a new one from a preset or a run.toml."
            )
        return folder
    if not options.grid:
        raise ConfigError(
            "No settings to combine: pass --grid KEY=VALUE,VALUE, "
            "for example --grid adapter.rank=8,16."
        )
    grid = [sweep_folder.parse_grid(text) for text in options.grid]
    return sweep_folder.create(read_run(options), grid)


def train(folder: Path, run_in: Callable[[Path], int], stopped: int) -> int:
    """Trains all runs that are not finished, and writes the results after each.

    Continues after a failed run. Ends when `run_in` returns the exit code `stopped`. Returns the
    last exit code that is not 0, else 0.
    """
    code = 0
    for run in sweep_folder.read(folder)[1]:
        if run_status.read_status(run).state not in NOT_FINISHED:
            continue
        run_code = run_in(run)
        write_results(folder)
        if run_code == stopped:
            return stopped
        code = run_code or code
    write_results(folder)
    return code


def queue_runs(folder: Path) -> None:
    """Queues all new runs, in their order. The page trains them when the device is free."""
    for run in sweep_folder.read(folder)[1]:
        if run_status.read_status(run).state == "new":
            run_requests.request(run, "queued")

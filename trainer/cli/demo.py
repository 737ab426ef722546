"""The command that trains an example on the embedded base: demo."""

import argparse
from pathlib import Path

from trainer.cli.run_options import Commands
from trainer.runs import run_folder
from trainer.training.runner import run_in


def add_commands(commands: Commands) -> None:
    demo = commands.add_parser(
        "demo", help="train the example subject on the embedded base and report the result"
    )
    demo.add_argument(
        "--output", type=Path, help="folder for the run folder (default: outputs/runs)"
    )
    demo.set_defaults(command=demo_command)


def demo_command(options: argparse.Namespace) -> int:
    # Imports numpy and PIL, which would slow `--help` down.
    from trainer.cli.demo_report import demo

    return demo(options.output or run_folder.runs_folder(), run_in)

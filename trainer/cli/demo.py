"""The command that shows the whole job: demo."""

import argparse
from pathlib import Path
from typing import Any

from trainer.runs import run_folder


def add_commands(commands: Any) -> None:
    demo = commands.add_parser(
        "demo", help="train the example subject on the embedded base and report what it learned"
    )
    demo.add_argument("--output", type=Path, help="where the run folder goes (outputs/runs)")
    demo.set_defaults(command=demo_command)


def demo_command(options: argparse.Namespace) -> int:
    from trainer.cli.demo_report import demo
    from trainer.training.runner import run_in

    return demo(options.output or run_folder.runs_folder(), run_in)

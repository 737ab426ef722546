"""The entry point of the command line.

Exit codes: 0 done, 1 failed with a message, 2 wrong usage, 3 stopped on request with everything
saved. Only this module turns a TrainerError into a message.
"""

import argparse
import sys
from collections.abc import Sequence

from trainer import __version__
from trainer.cli import adapters, cache, dataset, demo, info, merge, sample, train
from trainer.cli.sweep import sweep_command
from trainer.errors import TrainerError

COMMANDS = (train, sweep_command, sample, dataset, info, cache, adapters, merge, demo)
"""The modules with commands, in the order of `--help`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    `arguments` default to the process's. Wrong usage raises SystemExit with code 2.
    """
    options = build_parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except TrainerError as error:
        print(f"\n{error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
    return 1


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands. `options.command` is the function to call."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer", description="Trains LoRA adapters for Stable Diffusion."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add_commands(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())

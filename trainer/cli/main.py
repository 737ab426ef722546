"""The command line: `python -m trainer COMMAND`. The only place that turns an error into a message.

Exit code 0: done. 1: failed, with a sentence. 2: wrong usage. 3: stopped on request, with everything saved.
"""

import argparse
import sys
from collections.abc import Sequence

from trainer import __version__
from trainer.cli import adapters, cache, dataset, demo, info, sample, sweep, train
from trainer.errors import TrainerError

COMMANDS = (train, sweep, sample, dataset, info, cache, adapters, demo)


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        return options.command(options) or 0
    except TrainerError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
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

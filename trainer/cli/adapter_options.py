"""Options and output that the commands for adapters share.

With `--json` each line of output is an object: `{"progress": [done, total]}` during the work, and
the result at the end. The page reads these lines.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.cli.run_options import Commands
from trainer.errors import ConfigError

if TYPE_CHECKING:  # Imports torch.
    from trainer.lora.apply import WeightedAdapter

FORMATS = ("kohya", "diffusers", "peft")
PRECISIONS = ("fp16", "bf16", "fp32")
PROGRESS_INTERVAL = 0.5
"""Seconds between two lines of progress."""


class Size(NamedTuple):
    """The size of the modules of a new adapter."""

    rank: int
    """Maximum rank of a module, or 0 for no maximum."""
    energy: float
    """Fraction of the squared singular values to keep."""


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    """Adds a command with a `--json` option and returns its parser."""
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.add_argument(
        "--json", action="store_true", help="print progress and the result as JSON lines"
    )
    parser.set_defaults(command=run)
    return parser


def add_adapters_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter",
        action="append",
        required=True,
        metavar="FILE[:STRENGTH[:TEXT]]",
        help="can be repeated; TEXT is the strength in the text encoders",
    )


def add_prediction_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prediction",
        choices=("auto", "epsilon", "v"),
        default="auto",
        help="base.prediction, if the files of the base do not contain it",
    )


def add_size_options(parser: argparse.ArgumentParser, zero: str, rank: int = 0) -> None:
    """Adds `--rank` and `--energy`. `zero` describes what a rank of 0 means."""
    parser.add_argument("--rank", type=int, default=rank, help=f"maximum rank of a module ({zero})")
    parser.add_argument(
        "--energy",
        type=float,
        default=1.0,
        help="fraction of the squared singular values to keep, such as 0.95",
    )


def add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--precision", choices=PRECISIONS, default="fp16")
    parser.add_argument(
        "--family", default="", help="such as sdxl, if the file does not contain it"
    )
    parser.add_argument("--output", type=Path, required=True)


def add_format_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--to",
        choices=FORMATS,
        default="",
        dest="format",
        help="format of the file (default: what most programs read for this base)",
    )


def parse_adapter(text: str) -> dict[str, Any]:
    """Returns the file and the strengths in "a.safetensors:0.8:0.5", as for `SampleRequest`.

    A colon can also belong to the path (`C:\\...`): strengths are only split off until the rest
    is a file. Raises ConfigError if a strength is not a number.
    """
    file = text
    strengths: list[str] = []
    while len(strengths) < 2 and ":" in file and not _is_adapter(file):
        file, _, strength = file.rpartition(":")
        strengths.insert(0, strength)
    try:
        numbers = [float(strength) for strength in strengths]
    except ValueError:
        raise ConfigError(
            "--adapter takes FILE, FILE:STRENGTH or FILE:STRENGTH:TEXT, for example "
            f"maya.safetensors:0.8; got {text!r}."
        ) from None
    return {"file": file, **dict(zip(("strength", "text_strength"), numbers, strict=False))}


def _is_adapter(file: str) -> bool:
    return file.endswith(".safetensors") or Path(file).exists()


def read_adapters(texts: Sequence[str]) -> "list[WeightedAdapter]":
    """Reads the adapters of `--adapter` options. Without a strength it is 1."""
    from trainer.lora.apply import WeightedAdapter
    from trainer.lora.formats.reader import read_adapter

    adapters = []
    for text in texts:
        parsed = parse_adapter(text)
        strength = parsed.get("strength", 1.0)
        text_strength = parsed.get("text_strength", strength)
        adapters.append(
            WeightedAdapter(read_adapter(Path(parsed["file"])), strength, text_strength)
        )
    return adapters


def parse_size(options: argparse.Namespace) -> Size:
    """Raises ConfigError if the rank or the energy is out of range."""
    if options.rank < 0 or not 0 < options.energy <= 1:
        raise ConfigError(
            "--rank must be 0 or more, and --energy above 0 and at most 1; "
            f"got {options.rank} and {options.energy:g}."
        )
    return Size(options.rank, options.energy)


def check_free(output: Path) -> None:
    """Raises ConfigError if the output exists, because nothing is overwritten."""
    if output.exists():
        raise ConfigError(f"{output} already exists. Choose another name.")


class Report:
    """Prints progress and the result, for people or as JSON lines."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._printed_at = time.monotonic()

    def progress(self, done: int, total: int) -> None:
        if time.monotonic() - self._printed_at < PROGRESS_INTERVAL:
            return
        self._printed_at = time.monotonic()
        if self._as_json:
            print(json.dumps({"progress": [done, total]}), flush=True)
        else:
            # Standard output is for the result.
            print(f"{done} of {total}", flush=True, file=sys.stderr)

    def result(self, values: dict[str, Any]) -> None:
        """Prints the result. Lists are for JSON only."""
        if self._as_json:
            print(json.dumps(values, ensure_ascii=False), flush=True)
            return
        for key, value in values.items():
            if not isinstance(value, list):
                print(f"{key.replace('_', ' ') + ':':22}{value}")

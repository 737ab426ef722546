"""The command that shows the content of an adapter or a base model: info."""

import argparse
import json
from pathlib import Path

from trainer.cli.run_options import Commands

LABELS = {"dialect": "format", "pictures": "images", "odd": "notes"}
"""Labels that differ from the JSON keys, which scripts use."""


def add_commands(commands: Commands) -> None:
    info = commands.add_parser("info", help="show the content of an adapter or a base model")
    info.add_argument(
        "file",
        type=Path,
        help="a file, or a folder with a PEFT adapter or a base model in diffusers' layout",
    )
    info.add_argument("--json", action="store_true")
    info.add_argument(
        "--ranks", action="store_true", help="also show how much of an adapter smaller ranks keep"
    )
    info.set_defaults(command=info_command)


def info_command(options: argparse.Namespace) -> int:
    # Imports torch, which would slow `--help` down.
    from trainer.cli.describe import describe

    values = describe(options.file)
    ranks = _energy_by_rank(options.file) if options.ranks else []
    if options.json:
        result = values | {"ranks": ranks} if options.ranks else values
        print(json.dumps(result, ensure_ascii=False))
        return 0
    for key, value in values.items():
        print(f"{LABELS.get(key, key) + ':':22}{value}")
    for rank, total, worst in ranks:
        print(f"rank {rank} keeps {total:.2%} in total, {worst:.2%} of the layer that loses most")
    return 0


def _energy_by_rank(file: Path) -> list[tuple[int, float, float]]:
    from trainer.lora.formats.reader import read_adapter
    from trainer.lora.transform import energy_by_rank

    return energy_by_rank(read_adapter(file).modules)

"""The command that shows what a file contains: info."""

import argparse
import json
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    info = commands.add_parser("info", help="say what an adapter or a base model holds")
    info.add_argument(
        "file",
        type=Path,
        help="a file, or the folder of a PEFT adapter or of a base model in diffusers' layout",
    )
    info.add_argument("--json", action="store_true")
    info.add_argument(
        "--ranks",
        action="store_true",
        help="also what of an adapter would be kept at smaller ranks",
    )
    info.set_defaults(command=info_command)


def info_command(options: argparse.Namespace) -> int:
    from trainer.cli.describe import describe

    facts = describe(options.file)
    ranks = _energy_by_rank(options.file) if options.ranks else []
    if options.json:
        print(json.dumps(facts | ({"ranks": ranks} if options.ranks else {}), ensure_ascii=False))
        return 0
    rows = [
        f"rank {rank} keeps {whole:.2%} of the whole, {worst:.2%} of the layer that loses most"
        for rank, whole, worst in ranks
    ]
    print("\n".join([*(f"{key + ':':22}{value}" for key, value in facts.items()), *rows]))
    return 0


def _energy_by_rank(file: Path) -> list[tuple[int, float, float]]:
    from trainer.lora.formats.reader import read_adapter
    from trainer.lora.transform import energy_by_rank

    return energy_by_rank(read_adapter(file).modules)

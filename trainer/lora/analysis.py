"""What is in a finished adapter: where it changes the base, and how much of its rank it uses. Written beside it for the page."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.lora.formats.adapted_module import AdaptedModule, decompose
from trainer.lora.transform import pair
from trainer.runs.atomic_files import atomic_write

NAME = "learned.json"
SHARES = (0.95, 0.99)
PLACES = (
    (r"down_blocks\.(\d+)", "down"),
    (r"mid_block", "middle"),
    (r"up_blocks\.(\d+)", "up"),
    (r"(?:transformer_)?blocks\.(\d+)", "block"),
    (r".*layers\.(\d+)", "text"),
)


def block_of(module: AdaptedModule) -> tuple[int, str, int]:
    """Where a module stands, in the order of the picture's way: (kind, name, number) with (0, "down", 2) for down_blocks.2."""
    for order, (pattern, name) in enumerate(PLACES):
        if found := re.match(pattern, module.name):
            second = " " + module.component[-1] if module.component[-1].isdigit() else ""
            return order, name + second, int(found[1]) if found.groups() else -1
    return len(PLACES), "others", -1


def learned(modules: Sequence[AdaptedModule]) -> dict[str, Any]:
    """The norm of the change in each block, and of each module the singular values of its change (largest first, float64).

    "enough" is the rank at which all modules together keep a share of their squared singular values. It is left out for a DoRA, which
    cannot be resized by itself, and for whole products (LoHa, LoKr), whose decomposition would take minutes.
    """
    blocks: dict[tuple[int, str, int], float] = {}
    rows, spectra = [], []
    for module in modules:
        norm = float(module.delta.double().norm())
        blocks[block_of(module)] = blocks.get(block_of(module), 0.0) + norm**2
        row: dict[str, Any] = {"name": f"{module.component}.{module.name}", "norm": norm}
        if set(module.tensors) == {"lora_down.weight", "lora_up.weight"}:
            sizes = decompose(*pair(module))[1]
            spectra.append(sizes.square().tolist())
            row |= {
                "values": [float(f"{size:.4g}") for size in sizes.tolist()],
                "enough": enough([spectra[-1]]),
            }
        rows.append(row)
    facts: dict[str, Any] = {
        "blocks": [
            [f"{name} {number}" if number >= 0 else name, square**0.5]
            for (_, name, number), square in sorted(blocks.items())
        ],
        "modules": rows,
    }
    if len(spectra) == len(rows) and any(map(sum, spectra)):
        rank = max(map(len, spectra))
        total = sum(map(sum, spectra))
        shares = [
            sum(squares[place] for squares in spectra if place < len(squares)) / total
            for place in range(rank)
        ]
        facts |= {"rank": rank, "spectrum": shares, "enough": enough(spectra)}
    return facts


def enough(spectra: Sequence[Sequence[float]]) -> dict[str, int]:
    """The least rank that keeps each of SHARES of all squared singular values: {"95": 3, "99": 7}."""
    total, found = sum(map(sum, spectra)), {}
    for share in SHARES:
        rank = 1
        while sum(sum(squares[:rank]) for squares in spectra) < share * total - 1e-12 * total:
            rank += 1
        found[f"{share:.0%}".rstrip("%")] = rank
    return found


def write(folder: Path, modules: Sequence[AdaptedModule], dialect: str, precision: str) -> None:
    """learned.json: what `learned` gives, and the format of the file that a smaller one would be made in."""
    atomic_write(
        folder / NAME, json.dumps(learned(modules) | {"dialect": dialect, "precision": precision})
    )

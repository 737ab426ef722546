"""What a finished adapter learned: the norm of its change by block, and the rank that it uses.

A run writes the result to learned.json for the page.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.lora.formats.adapted_module import AdaptedModule, decompose
from trainer.lora.transform import low_rank_pair
from trainer.runs.atomic_files import atomic_write

FILE_NAME = "learned.json"
SHARES = {"95": 0.95, "99": 0.99}
"""Shares of the squared singular values, by their names in the file."""
ROUNDING = 1e-12
"""A share may be missed by this much."""
BLOCK_PATTERNS = (
    (r"down_blocks\.(\d+)", "down"),
    (r"mid_block", "middle"),
    (r"up_blocks\.(\d+)", "up"),
    (r"(?:transformer_)?blocks\.(\d+)", "block"),
    (r".*layers\.(\d+)", "text"),
)
"""Module paths of each kind of block, in the order of computation."""


def block_of(module: AdaptedModule) -> tuple[int, str, int]:
    """Returns a sort key of the module's block, its name, and its number or -1.

    down_blocks.2 -> (0, "down", 2)
    """
    for order, (pattern, name) in enumerate(BLOCK_PATTERNS):
        match = re.match(pattern, module.name)
        if match:
            encoder = module.component[-1] if module.component[-1].isdigit() else ""
            number = int(match[1]) if match.groups() else -1
            return order, f"{name} {encoder}".rstrip(), number
    return len(BLOCK_PATTERNS), "others", -1


def analyse(modules: Sequence[AdaptedModule]) -> dict[str, Any]:
    """Returns the norm of the change in each block, and the singular values of each module.

    The singular values are float64, largest first. "enough" is the rank at which all modules
    together keep a share of their squared singular values. It is missing for a DoRA, which cannot
    be resized without its base, and for LoHa and LoKr, whose decomposition would take minutes.
    """
    squared_norms: dict[tuple[int, str, int], float] = {}
    rows: list[dict[str, Any]] = []
    spectra: list[list[float]] = []
    for module in modules:
        norm = float(module.delta.double().norm())
        block = block_of(module)
        squared_norms[block] = squared_norms.get(block, 0.0) + norm**2
        row: dict[str, Any] = {"name": f"{module.component}.{module.name}", "norm": norm}
        if module.is_plain_lora:
            values = decompose(*low_rank_pair(module))[1]
            spectrum = values.square().tolist()
            spectra.append(spectrum)
            row["values"] = [float(f"{value:.4g}") for value in values.tolist()]
            row["enough"] = sufficient_ranks([spectrum])
        rows.append(row)

    blocks = []
    for (_, name, number), square in sorted(squared_norms.items()):
        blocks.append([f"{name} {number}" if number >= 0 else name, square**0.5])
    result: dict[str, Any] = {"blocks": blocks, "modules": rows}
    if len(spectra) == len(rows) and any(map(sum, spectra)):
        result["rank"] = max(map(len, spectra))
        result["spectrum"] = _share_by_rank(spectra)
        result["enough"] = sufficient_ranks(spectra)
    return result


def _share_by_rank(spectra: Sequence[Sequence[float]]) -> list[float]:
    """Returns the share of all squared singular values that each further rank adds."""
    total = sum(map(sum, spectra))
    shares = []
    for index in range(max(map(len, spectra))):
        shares.append(sum(squares[index] for squares in spectra if index < len(squares)) / total)
    return shares


def sufficient_ranks(spectra: Sequence[Sequence[float]]) -> dict[str, int]:
    """Returns the smallest rank that keeps each of SHARES: {"95": 3, "99": 7}.

    `spectra` are the squared singular values of each module, largest first.
    """
    total = sum(map(sum, spectra))
    ranks = {}
    for name, share in SHARES.items():
        rank = 1
        while sum(sum(squares[:rank]) for squares in spectra) < share * total - ROUNDING * total:
            rank += 1
        ranks[name] = rank
    return ranks


def write(folder: Path, modules: Sequence[AdaptedModule], file_format: str, precision: str) -> None:
    """Writes learned.json: the analysis, and the format and precision for a smaller file."""
    content = analyse(modules) | {"dialect": file_format, "precision": precision}
    atomic_write(folder / FILE_NAME, json.dumps(content))

"""Parsers of settings that are lists written as text, and the checks that use them.

Every function raises ValueError with an example of the right form.
"""

import ast
import re
from collections.abc import Iterable
from typing import Any

import regex

MAX_NUMBER = 4096
MAX_RANK = 512
OWN_SETTINGS = ("lr", "params", "weight_decay")
"""Arguments of an optimiser that are set elsewhere."""


def optimizer_arguments(lines: Iterable[str]) -> dict[str, Any]:
    """("betas=(0.9, 0.99)", "eps=1e-6") -> {"betas": (0.9, 0.99), "eps": 1e-06}.

    Accepts only Python literals, because a file of settings may come from a stranger.
    """
    arguments: dict[str, Any] = {}
    for line in lines:
        name, equals, text = (part.strip() for part in line.partition("="))
        if not equals or not re.fullmatch(r"[A-Za-z]\w*", name):
            raise ValueError(f"{line!r} is not of the form name=value, such as betas=(0.9, 0.99)")
        if name in arguments:
            raise ValueError(f"{name} is given twice")
        if name in OWN_SETTINGS:
            raise ValueError(f"{name} is not an argument here; it has its own setting")
        try:
            arguments[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            raise ValueError(
                f"the value of {name} is not a number, True, False, None, text in quotes, or a "
                "(list, of, them)"
            ) from None
    return arguments


def folder_repeats(lines: Iterable[str]) -> dict[str, int]:
    """("closeups = 3", ". = 2") -> {"closeups": 3, ".": 2}. The dot is the dataset's own folder."""
    repeats = {}
    for line in lines:
        folder, equals, count = (part.strip() for part in line.rpartition("="))
        if not equals or not folder or not re.fullmatch(r"[1-9]\d{0,2}", count):
            raise ValueError(f"{line!r} is not of the form folder = number, such as closeups = 3")
        repeats[folder.strip("/") or "."] = int(count)
    return repeats


def numbers_by_name(text: str) -> dict[str, float]:
    """ "mid_block=32, attn2=8" -> {"mid_block": 32.0, "attn2": 8.0}."""
    numbers = {}
    for part in text.split(","):
        if not part.strip():
            continue
        match = regex.fullmatch(r"([A-Za-z_][\w.]*)\s*=\s*(\d+(?:\.\d+)?)", part.strip())
        if not match or float(match[2]) > MAX_NUMBER:
            raise ValueError(
                f"{part.strip()[:40]!r} is not of the form name=number with a number up to "
                f"{MAX_NUMBER}, such as mid_block=32, attn2=8"
            )
        numbers[match[1]] = float(match[2])
    return numbers


# Checks of one setting. Each returns the text unchanged.


def checked_argument(line: str) -> str:
    optimizer_arguments([line])
    return line


def checked_repeats(line: str) -> str:
    folder_repeats([line])
    return line


def checked_ranks(text: str) -> str:
    if any(rank != int(rank) or rank > MAX_RANK for rank in numbers_by_name(text).values()):
        raise ValueError(f"ranks are whole numbers up to {MAX_RANK}")
    return text


def checked_alphas(text: str) -> str:
    if not all(numbers_by_name(text).values()):
        raise ValueError("an alpha is above 0; to leave a block out, set its rank to 0")
    return text


def checked_pattern(text: str) -> str:
    try:
        regex.compile(text)
    except regex.error as error:
        raise ValueError(f"not a valid regular expression ({error})") from None
    return text

"""Parsers of list-like texts."""

import ast
import re
from collections.abc import Iterable
from typing import Any

import regex


def optimizer_arguments(lines: Iterable[str]) -> dict[str, Any]:
    """("betas=(0.9, 0.99)", "eps=1e-6") -> {"betas": (0.9, 0.99), "eps": 1e-06}. Only literals: a config can come from a stranger."""
    found: dict[str, Any] = {}
    for line in lines:
        name, equals, text = (part.strip() for part in line.partition("="))
        if not equals or not re.fullmatch(r"[A-Za-z]\w*", name):
            raise ValueError(f"{line!r} is not of the form name=value, such as betas=(0.9, 0.99)")
        if name in ("lr", "params", "weight_decay") or name in found:
            raise ValueError(
                f"{name} " + ("is given twice" if name in found else "has a field of its own")
            )
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            raise ValueError(
                f"the value of {name} is no number, True, False, None, text in quotes or (list, of, such)"
            ) from None
    return found


def folder_repeats(lines: Iterable[str]) -> dict[str, int]:
    """("closeups = 3",) -> {"closeups": 3}."""
    found = {}
    for line in lines:
        name, equals, count = (part.strip() for part in line.rpartition("="))
        if not equals or not name or not re.fullmatch(r"[1-9]\d{0,2}", count):
            raise ValueError(f"{line!r} is not of the form folder = number, such as closeups = 3")
        found[name.strip("/") or "."] = int(count)
    return found


def checked_repeats(line: str) -> str:
    folder_repeats([line])
    return line


def checked_argument(line: str) -> str:
    optimizer_arguments([line])
    return line


def numbers_by_name(text: str) -> dict[str, float]:
    """ "mid_block=32, attn2=8" -> {"mid_block": 32.0, "attn2": 8.0}. Raises ValueError with how to write it."""
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = regex.fullmatch(r"([A-Za-z_][\w.]*)\s*=\s*(\d+(?:\.\d+)?)", part)
        if not match or not float(match[2]) <= 4096:
            raise ValueError(
                f"write it as mid_block=32, attn2=8 (a name, =, a number up to 4096); {part[:40]!r} is something else"
            )
        found[match[1]] = float(match[2])
    return found


def ranks(text: str) -> str:
    if any(value != int(value) or value > 512 for value in numbers_by_name(text).values()):
        raise ValueError("ranks are whole numbers up to 512")
    return text


def alphas(text: str) -> str:
    if not all(numbers_by_name(text).values()):
        raise ValueError("an alpha is above 0; to leave a part out, set its rank to 0")
    return text


def pattern(text: str) -> str:
    try:
        regex.compile(text)
    except regex.error as error:
        raise ValueError(f"this is no regular expression ({error})") from None
    return text

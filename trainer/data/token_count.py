"""Counts the tokens of captions with the base's own tokenizer, without importing torch."""

import json
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LIMIT = 75  # tokens that CLIP reads at once, without its start and end tokens
MAX_CHARACTERS = 20_000  # a longer caption is far too long anyway

# How CLIP splits a text before its merges (Radford et al. 2021; the pattern of its tokenizer).
_CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

Counter = Callable[[list[str]], list[int]]
"""Returns the number of tokens of each text."""


def counter(folder: Path | None = None) -> Counter:
    """Returns a function that counts tokens, without start and end tokens.

    Without a tokenizer folder it counts words and punctuation marks instead.
    """
    tokenizer = _load_tokenizer(folder) if folder else None
    if tokenizer is None:
        return _count_words

    def count(texts: list[str]) -> list[int]:
        shortened = [text[:MAX_CHARACTERS] for text in texts]
        encodings = tokenizer.encode_batch(shortened, add_special_tokens=False)
        return [len(encoding.ids) for encoding in encodings]

    return count


def _count_words(texts: list[str]) -> list[int]:
    return [len(re.findall(r"\w+|[^\w\s]", text[:MAX_CHARACTERS])) for text in texts]


@lru_cache(maxsize=4)
def _load_tokenizer(folder: Path) -> "Tokenizer | None":
    """Loads `tokenizer.json`, or CLIP's `vocab.json` and `merges.txt`; None if both are missing."""
    from tokenizers import Tokenizer

    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        tokenizer = _clip_tokenizer(folder)
    else:
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _clip_tokenizer(folder: Path) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    merges = []
    for line in (folder / "merges.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#version"):
            first, second = line.split()
            merges.append((first, second))
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<|endoftext|>", end_of_word_suffix="</w>")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer

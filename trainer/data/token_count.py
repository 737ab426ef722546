"""How long a caption is for the text encoder, counted by the base's own tokenizer and without torch."""

import json
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

LIMIT = (
    75  # tokens that the CLIP encoders of Stable Diffusion read at once, beside their start and end
)
MOST_CHARACTERS = 20_000  # of a caption are counted: what is longer is far too long anyway

# CLIP's own way of cutting a text before its merges apply (Radford et al. 2021; the pattern of its published tokenizer).
_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

Counter = Callable[[list[str]], list[int]]


def counter(folder: Path | None = None) -> Counter:
    """Counts the tokens of captions, start and end marks left out; without a tokenizer folder words and signs are counted."""
    tokenizer = _tokenizer(folder) if folder else None
    if tokenizer is None:
        return lambda texts: [
            len(re.findall(r"\w+|[^\w\s]", text[:MOST_CHARACTERS])) for text in texts
        ]
    return lambda texts: [
        len(encoding.ids)
        for encoding in tokenizer.encode_batch(
            [text[:MOST_CHARACTERS] for text in texts], add_special_tokens=False
        )
    ]


@lru_cache(maxsize=4)
def _tokenizer(folder: Path) -> Any:
    """From `tokenizer.json`, or from CLIP's `vocab.json` and `merges.txt`; None where there is neither."""
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


def _clip_tokenizer(folder: Path) -> Any:
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [
        (first, second)
        for first, second in (
            line.split() for line in lines if line and not line.startswith("#version")
        )
    ]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<|endoftext|>", end_of_word_suffix="</w>")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer

"""Loads single-file base models and VAEs with diffusers' own conversion, offline.

Diffusers takes configurations as a folder, so a temporary one is written. Its contents were
derived from the tensor shapes by `trainer.models.single_file`.
"""

import gzip
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from trainer.models.model_files import BaseFiles
from trainer.models.pipelines import WEIGHTS
from trainer.models.single_file import CONFIGS_FOLDER

START, END = "<|startoftext|>", "<|endoftext|>"


def load_pipeline(
    files: BaseFiles, pipeline_class: Any, options: dict[str, Any], dtype: torch.dtype
) -> Any:
    """Returns the pipeline of a single file in `dtype`, with the VAE of `options`.

    Raises what diffusers raises.
    """
    with _configs_folder(files) as configs:
        return pipeline_class.from_single_file(
            str(files.path),
            config=str(configs),
            torch_dtype=dtype,
            local_files_only=True,
            **_tokenizers(files),
            **options,
        )


def load_vae(files: BaseFiles) -> AutoencoderKL:
    """Returns the VAE of `files` in float32, from a diffusers folder or a single file."""
    weights = files.weights["vae"][0]
    if weights.name.startswith(WEIGHTS["vae"]) and weights.with_name("config.json").is_file():
        variant = "fp16" if ".fp16." in weights.name else None
        return AutoencoderKL.from_pretrained(
            weights.parent,
            torch_dtype=torch.float32,
            use_safetensors=True,
            variant=variant,
            local_files_only=True,
        )
    with _configs_folder(files) as configs:
        return AutoencoderKL.from_single_file(
            str(weights),
            config=str(configs),
            subfolder="vae",
            torch_dtype=torch.float32,
            local_files_only=True,
        )


@contextmanager
def _configs_folder(files: BaseFiles) -> Iterator[Path]:
    """Writes the configurations of a base into a temporary folder in diffusers' layout."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        if files.template:
            shutil.copy(CONFIGS_FOLDER / files.template / "model_index.json", folder)
        for part, config in files.configs.items():
            (folder / part).mkdir()
            file = "scheduler_config.json" if part == "scheduler" else "config.json"
            (folder / part / file).write_text(json.dumps(config), encoding="utf-8")
        yield folder


def _tokenizers(files: BaseFiles) -> dict[str, CLIPTokenizer]:
    """Returns the tokenizers of a single file by component.

    OpenAI's encoders were trained with the end token as padding, OpenCLIP's with token 0, "!".
    """
    tokenizers = {}
    for part in files.tokenizers:
        encoder = files.configs[part.replace("tokenizer", "text_encoder")]
        is_open_clip = encoder["hidden_act"] != "quick_gelu"
        tokenizers[part] = clip_tokenizer("!" if is_open_clip else END)
    return tokenizers


def clip_tokenizer(pad_token: str = END) -> CLIPTokenizer:
    """Returns CLIP's tokenizer, a byte-level BPE of 49,408 tokens.

    The tokens are the 256 bytes, the 256 bytes at the end of a word, one token per merge, and the
    start and end tokens.
    """
    compressed = (CONFIGS_FOLDER / "clip" / "merges.txt.gz").read_bytes()
    merges = [
        tuple(line.split(" ")) for line in gzip.decompress(compressed).decode("utf-8").splitlines()
    ]
    letters = byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += ["".join(pair) for pair in merges]
    tokens += [START, END]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        pad_token=pad_token,
        model_max_length=77,
    )


def byte_letters() -> list[str]:
    """Returns the characters that represent the 256 bytes in the vocabulary, in its order.

    A printable byte is represented by itself, and the others follow as U+0100, U+0101 and so on.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(others)]

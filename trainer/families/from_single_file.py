"""Loading what is not a diffusers folder: single-file checkpoints and single-file VAEs, with diffusers' own conversion, offline.

Diffusers takes the configurations as a folder. One is written for the moment, with what `trainer.checkpoint` read from the shapes.
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

from trainer.models.model_files import WEIGHTS, BaseFiles
from trainer.models.single_file import CONFIGS_FOLDER

END = "<|endoftext|>"


def load_pipeline(
    files: BaseFiles, pipeline_class: Any, options: dict[str, Any], dtype: torch.dtype
) -> Any:
    """A pipeline of a single-file checkpoint, its VAE in float32. Raises what diffusers raises."""
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
    """The VAE that `files` names, in float32, from a diffusers folder or out of a single file."""
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
    """OpenAI's encoders were trained with the end mark as padding, OpenCLIP's with 0, which is "!"."""
    tokenizers = {}
    for part in files.tokenizers:
        open_clip = (
            files.configs[part.replace("tokenizer", "text_encoder")]["hidden_act"] != "quick_gelu"
        )
        tokenizers[part] = clip_tokenizer("!" if open_clip else END)
    return tokenizers


def clip_tokenizer(pad_token: str = END) -> CLIPTokenizer:
    """CLIP's byte-level BPE of 49,408 words: the 256 bytes, the same at the end of a word, one for each merge, and two marks."""
    merges = (
        gzip.decompress((CONFIGS_FOLDER / "clip" / "merges.txt.gz").read_bytes())
        .decode("utf-8")
        .splitlines()
    )
    pairs = [tuple(line.split(" ")) for line in merges]
    letters = byte_letters()
    words = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *("".join(pair) for pair in pairs),
        "<|startoftext|>",
        END,
    ]
    return CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=pairs,
        pad_token=pad_token,
        model_max_length=77,
    )


def byte_letters() -> list[str]:
    """The letters that stand for the 256 bytes: printable ones for themselves, then the others from U+0100 on, in that order."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(others)]

"""Reads and checks a base model in diffusers' folder layout, before anything is loaded.

Only file names, JSON and tensor headers are read. Nothing in the folder is ever executed.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trainer.errors import ModelError
from trainer.models.pipelines import PIPELINES, T5_PARTS, UNUSED_PARTS, WEIGHTS
from trainer.models.safetensors_header import TensorInfo, read_header

# Keys that make diffusers or transformers import code from the folder or from the hub.
CODE_KEYS = (
    "auto_map",
    "_attn_implementation_internal",
    "attn_implementation",
    "_attn_implementation",
    "custom_pipelines",
)
ABSENT = (None, [None, None])  # how a model_index.json marks a part that the model does not have

Editions = dict[str | None, list[Path]]
"""Variant of the weights, None or "fp16" -> its files, several if the weights are sharded."""


class DiffusersFolder(NamedTuple):
    """The contents of a folder that passed the checks; see `model_files.BaseFiles`."""

    pipeline: str
    configs: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, TensorInfo]]
    weights: dict[str, list[Path]]
    variant: str | None


def read_folder(folder: Path, t5: bool) -> DiffusersFolder:
    """Returns the checked contents of a model folder, without T5 unless `t5` is true.

    Raises ModelError if the folder is incomplete, damaged or names anything unexpected.
    """
    index = read_json(folder / "model_index.json")
    pipeline = str(index.get("_class_name"))
    if pipeline not in PIPELINES:
        raise ModelError(
            f"{folder.name} is a {pipeline[:80]}; "
            f"adapters are trained on Stable Diffusion ({' or '.join(PIPELINES)})."
        )
    _check_scheduler(folder, index)
    _check_other_parts(folder, index)

    configs = {"scheduler": read_json(folder / "scheduler" / "scheduler_config.json")}
    editions: dict[str, Editions] = {}
    uses_t5 = t5 and index.get("text_encoder_3") not in ABSENT
    for part in PIPELINES[pipeline]:
        if part in T5_PARTS and not uses_t5:
            continue
        _check_part(folder, index, part)
        if part in WEIGHTS:
            configs[part] = read_json(folder / part / "config.json")
            editions[part] = find_weights(folder / part, WEIGHTS[part])
        else:
            _check_tokenizer(folder / part)

    # Given variant="fp16", diffusers loads the fp16 edition of every part that has one.
    variant = None if all(None in found for found in editions.values()) else "fp16"
    weights = {
        part: found[variant] if variant in found else found[None]
        for part, found in editions.items()
    }
    tensors = {part: read_tensors(paths) for part, paths in weights.items()}
    return DiffusersFolder(pipeline, configs, tensors, weights, variant)


def has_t5(folder: Path) -> bool:
    """Returns whether the model includes a T5, even if that part was not downloaded."""
    return read_json(folder / "model_index.json").get("text_encoder_3") not in ABSENT


def read_json(path: Path) -> dict[str, Any]:
    """Returns the contents of a JSON file.

    Raises ModelError if the file is missing, not a JSON object, or makes a library run code.
    """
    name = f"{path.parent.name}/{path.name}"
    if not path.is_file():
        raise ModelError(f"{name} is missing; the model folder is incomplete. Download it again.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ModelError(
            f"{name} is not valid JSON; the model folder is damaged. Download it again."
        ) from None
    if not isinstance(data, dict):
        raise ModelError(
            f"{name} is not a table of settings; the model folder is damaged. Download it again."
        )
    code = [key for key in CODE_KEYS if data.get(key)]
    if code:
        raise ModelError(
            f"{name} asks to run its own code ({code[0]}), which is never done. "
            "Use a model without it."
        )
    return data


def find_weights(folder: Path, stem: str) -> Editions:
    """Returns the weights of a component by variant: one file, or every shard of its index.

    Raises ModelError if there are none, so the result is never empty.
    """
    editions: Editions = {}
    for variant, name, index in (
        (None, stem, f"{stem}.safetensors.index.json"),
        ("fp16", f"{stem}.fp16", f"{stem}.safetensors.index.fp16.json"),
    ):
        whole = folder / f"{name}.safetensors"
        if whole.is_file():
            editions[variant] = [whole]
        elif (folder / index).is_file():
            editions[variant] = _find_shards(folder, name, index)
    if editions:
        return editions
    pickles = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".ckpt", ".pt")]
    if pickles:
        raise ModelError(
            f"{folder.name} contains only {min(pickles)}, a pickle file, which can run code when "
            "opened; convert the model to .safetensors first."
        )
    raise ModelError(
        f"The weights {folder.name}/{stem}.safetensors are missing; "
        "the model folder is incomplete. Download it again."
    )


def read_tensors(paths: Sequence[Path]) -> dict[str, TensorInfo]:
    """Returns the tensors of all shards together, by name."""
    tensors: dict[str, TensorInfo] = {}
    for path in paths:
        tensors |= read_header(path).tensors
    return tensors


def _check_scheduler(folder: Path, index: dict[str, Any]) -> None:
    entry = index.get("scheduler")
    if isinstance(entry, list) and len(entry) == 2:
        library, name = entry
        if library == "diffusers" and re.fullmatch(r"[A-Za-z]+Scheduler", str(name)):
            return
    raise ModelError(
        f"{folder.name}/model_index.json names {str(entry)[:80]} as scheduler; "
        "the file is damaged or not to be trusted. Download the model again."
    )


def _check_other_parts(folder: Path, index: dict[str, Any]) -> None:
    """Raises ModelError for a part that the pipeline does not have."""
    pipeline = index["_class_name"]
    allowed = {*PIPELINES[pipeline], "scheduler", *UNUSED_PARTS}
    for part, entry in index.items():
        if isinstance(entry, list) and entry not in ABSENT and part not in allowed:
            raise ModelError(
                f"{folder.name}/model_index.json names {part[:80]}, a part that no {pipeline} has; "
                "the file is damaged or not to be trusted. Download the model again."
            )


def _check_part(folder: Path, index: dict[str, Any], part: str) -> None:
    """Raises ModelError unless the index names an allowed class for a component."""
    entry, allowed = index.get(part), PIPELINES[index["_class_name"]][part]
    if entry not in [list(names) for names in allowed]:
        classes = " or ".join(name for _, name in sorted(allowed))
        raise ModelError(
            f"{folder.name}/model_index.json names {str(entry)[:80]} as {part}; it must be "
            f"{classes}. The file is damaged or not to be trusted. Download the model again."
        )
    if part in T5_PARTS and not (folder / part).is_dir():
        raise ModelError(
            f"{folder.name} lacks its {part} (T5). "
            "Download it, or train without T5: set base.t5 to false."
        )


def _find_shards(folder: Path, name: str, index: str) -> list[Path]:
    """Returns the shards that an index names. Raises ModelError for names that are not shards."""
    weight_map = read_json(folder / index).get("weight_map")
    names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    shard = re.compile(re.escape(name) + r"-\d{5}-of-\d{5}\.safetensors")
    unexpected = [each for each in names if not shard.fullmatch(each)]
    if not names or unexpected:
        problem = f"names {unexpected[0][:80]}" if unexpected else "names no file"
        raise ModelError(
            f"{folder.name}/{index} {problem}; it is damaged or not to be trusted. "
            "Download the model again."
        )
    for each in names:
        if not (folder / each).is_file():
            raise ModelError(
                f"The weights {folder.name}/{each} are missing; the model folder is incomplete. "
                "Download it again."
            )
    return [folder / each for each in names]


def _check_tokenizer(folder: Path) -> None:
    has_vocabulary = (folder / "tokenizer.json").is_file() or (
        (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    )
    if not has_vocabulary:
        raise ModelError(
            "The tokenizer has no vocabulary (vocab.json and merges.txt, or tokenizer.json); "
            "every caption would be read as empty. Download the model again."
        )
    for name in ("tokenizer_config.json", "tokenizer.json", "vocab.json"):
        if (folder / name).is_file():
            read_json(folder / name)

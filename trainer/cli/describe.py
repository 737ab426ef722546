"""Describes the content of an adapter or a base model for people."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainer.families import families_of_adapter, family_of
from trainer.lora.formats.adapted_module import AdaptedModule
from trainer.lora.formats.reader import FORMAT_NAMES, AdapterFile, read_adapter
from trainer.models.model_files import BaseFiles, inspect
from trainer.models.safetensors_header import TensorInfo, read_header
from trainer.models.single_file import PICKLES, UNET

COMPONENTS = {
    "unet": "UNet",
    "transformer": "transformer",
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
    "text_encoder_3": "third text encoder",
}
KINDS = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}
FROM_METADATA = {
    "trained on": "ss_sd_model_name",
    "trigger": "modelspec.trigger_phrase",
    "steps": "ss_steps",
    "pictures": "ss_num_train_images",
    "resolution": "modelspec.resolution",
    "learning rate": "ss_learning_rate",
    "preset": "atelier_preset",
    "made": "modelspec.date",
    "hash": "sshs_model_hash",
}
"""Keys of a description, and the metadata that contains their values."""
MAX_USUAL_SCALE = 8.0
"""A larger alpha / rank is more often a mistake than intended."""


def describe(path: Path) -> dict[str, str]:
    """Returns what an adapter or a base model contains, in the order in which to show it.

    `info --json` prints the same keys. Raises ModelError if the file is neither.
    """
    if is_base(path):
        return describe_base(inspect(path))
    file = read_adapter(path)
    modules = file.modules
    ranks = [module.rank for module in modules if module.rank]
    alphas = [round(module.scale * module.rank, 4) for module in modules if module.rank]
    description = {
        "file": f"{path.name}, {_size(path) / 1e6:.1f} MB, {file.dtype}",
        "family": " or ".join(families_of_adapter(file)) or "not in the file",
        "kind": _describe_kinds(modules),
        "dialect": FORMAT_NAMES[file.file_format],
        "modules": _describe_components(modules),
        "targets": _describe_targets(modules),
        "rank": _describe_range(ranks) or "none: whole factors",
        "alpha": _describe_range(alphas) or "none",
        "parameters": f"{sum(map(_parameter_count, modules)):,}",
    }
    for label, key in FROM_METADATA.items():
        if file.metadata.get(key):
            description[label] = file.metadata[key]
    return description | _notes([*file.notes, *unusual_properties(file)])


def _size(path: Path) -> int:
    """Returns the bytes of a file, or of all files in a folder."""
    if not path.is_dir():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _describe_kinds(modules: Sequence[AdaptedModule]) -> str:
    counts = kind_counts(modules)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def _describe_components(modules: Sequence[AdaptedModule]) -> str:
    counts = Counter(module.component for module in modules)
    return ", ".join(
        f"{count} in the {COMPONENTS.get(component, component)}"
        for component, count in counts.most_common()
    )


def _describe_targets(modules: Sequence[AdaptedModule]) -> str:
    """Returns the last parts of the names of all layers, such as "to_k, to_q"."""
    # The ".0" is the linear layer of diffusers' `to_out`.
    names = {module.name.removesuffix(".0").rpartition(".")[2] for module in modules}
    return ", ".join(sorted(names))


def _parameter_count(module: AdaptedModule) -> int:
    return sum(tensor.numel() for tensor in module.tensors.values())


def _notes(sentences: Sequence[str]) -> dict[str, str]:
    return {"odd": " ".join(sentences)} if sentences else {}


def is_base(path: Path) -> bool:
    """Whether a path is a base model. The reader of adapters reports everything else."""
    if path.suffix.lower() in PICKLES:
        return True
    if path.is_dir():
        return (path / "model_index.json").is_file()
    return path.is_file() and any(name.startswith(UNET) for name in read_header(path).tensors)


def describe_base(files: BaseFiles) -> dict[str, str]:
    """Returns what a base model contains, from its configurations and headers alone."""
    schedule = files.configs["scheduler"]
    # One file can contain several components.
    weights = set(itertools.chain.from_iterable(files.weights.values()))
    megabytes = sum(path.stat().st_size for path in weights) / 1e6
    description = {
        "base model": f"{files.path.name}, {megabytes:,.1f} MB",
        "family": family_of(files).name,
        "layout": _describe_layout(files),
        "prediction": _describe_prediction(schedule),
        "zero terminal SNR": "yes" if schedule.get("rescale_betas_zero_snr") else "no",
    }
    side = files.configs[files.denoiser].get("sample_size")
    if side:
        # Each level of the VAE but the first halves the sides.
        pixels = side * 2 ** (len(files.configs["vae"]["block_out_channels"]) - 1)
        description["made for"] = f"{pixels} x {pixels} pixels"
    for component, tensors in files.tensors.items():
        description[COMPONENTS.get(component, "VAE")] = _describe_tensors(tensors.values())
    return description | _notes(files.notes)


def _describe_layout(files: BaseFiles) -> str:
    if files.template:
        return "a single file"
    return "a diffusers folder, its fp16 variant" if files.variant else "a diffusers folder"


def _describe_prediction(schedule: dict[str, Any]) -> str:
    if "FlowMatch" in schedule["_class_name"]:
        return "flow matching"
    prediction = schedule.get("prediction_type", "epsilon")
    return prediction.removesuffix("_prediction") if prediction else "unknown: set base.prediction"


def _describe_tensors(tensors: Iterable[TensorInfo]) -> str:
    tensors = list(tensors)
    # Integers are positions, not weights.
    dtypes = sorted({info.dtype for info in tensors} - {"I32", "I64"})
    return f"{sum(info.numel for info in tensors):,} parameters in {', '.join(dtypes)}"


def kind_counts(modules: Iterable[AdaptedModule]) -> dict[str, int]:
    """Returns the number of modules of each kind, such as {"LoRA": 32, "LoCon": 4}."""
    return dict(Counter(map(_kind, modules)).most_common())


def _kind(module: AdaptedModule) -> str:
    name = KINDS.get(module.kind, "LoRA")
    # On the meta device the shape of delta W needs no memory.
    kernel = module.to("meta").delta.shape[2:]
    if name == "LoRA" and any(side > 1 for side in kernel):
        name = "LoCon"
    if "dora_scale" not in module.tensors:
        return name
    return "DoRA" if name == "LoRA" else f"DoRA ({name})"


def unusual_properties(file: AdapterFile) -> list[str]:
    """Returns sentences about what a person should know before using an adapter."""
    sentences = []
    idle = [module.name for module in file.modules if _is_idle(module)]
    if idle:
        sentences.append(
            f"{len(idle)} of {len(file.modules)} modules change nothing, such as {idle[0]}."
        )
    if any(abs(module.scale) > MAX_USUAL_SCALE for module in file.modules):
        sentences.append("Its alpha is many times its rank, so it may be too strong at strength 1.")
    if not file.metadata:
        sentences.append("It has no metadata; A1111 may not list it.")
    return sentences


def _is_idle(module: AdaptedModule) -> bool:
    return not module.delta.any() and "dora_scale" not in module.tensors


def _describe_range(values: Sequence[float]) -> str:
    """Returns "4", "4 to 16", or "" without values."""
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"

"""What an adapter or a base model says and shows of itself: `python -m trainer info FILE`."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from trainer.families import families_of_adapter, family_of
from trainer.lora.formats.adapted_module import AdaptedModule
from trainer.lora.formats.reader import FORMAT_NAMES, AdapterFile, read_adapter
from trainer.models.model_files import BaseFiles, inspect
from trainer.models.safetensors_header import read_header
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
LARGEST_SCALE = 8.0  # alpha / rank above this is a slip more often than a wish


def describe(path: Path) -> dict[str, str]:
    """Facts for people, in the order in which they are read. Raises ModelError for what is neither an adapter nor a base model."""
    if is_base(path):
        return describe_base(inspect(path))
    file = read_adapter(path)
    modules = file.modules
    size = (
        sum(part.stat().st_size for part in path.rglob("*") if part.is_file())
        if path.is_dir()
        else path.stat().st_size
    )
    parts, kinds = Counter(module.component for module in modules), kind_counts(modules)
    facts = {
        "file": f"{path.name}, {size / 1e6:.1f} MB, {file.dtype}",
        "family": " or ".join(families_of_adapter(file)) or "not told by the file",
        "kind": ", ".join(
            f"{count} {kind}" if len(kinds) > 1 else kind for kind, count in kinds.items()
        ),
        "dialect": FORMAT_NAMES[file.file_format],
        "modules": ", ".join(
            f"{count} in the {COMPONENTS.get(part, part)}" for part, count in parts.most_common()
        ),
        "targets": ", ".join(
            sorted({module.name.removesuffix(".0").rpartition(".")[2] for module in modules})
        ),
        "rank": _spread(module.rank for module in modules if module.rank) or "none: whole factors",
        "alpha": _spread(round(module.scale * module.rank, 4) for module in modules if module.rank)
        or "none",
        "parameters": f"{sum(tensor.numel() for module in modules for tensor in module.tensors.values()):,}",
    }
    facts |= {
        label: file.metadata[key] for label, key in FROM_METADATA.items() if file.metadata.get(key)
    }
    return facts | ({"odd": " ".join(odd)} if (odd := [*file.notes, *oddities(file)]) else {})


def is_base(path: Path) -> bool:
    """Whether a path is meant as a base model; a LoRA or anything else in a file is left to the reader of adapters."""
    if path.is_dir() or path.suffix.lower() in PICKLES:
        return path.suffix.lower() in PICKLES or (path / "model_index.json").is_file()
    return path.is_file() and any(name.startswith(UNET) for name in read_header(path).tensors)


def describe_base(files: BaseFiles) -> dict[str, str]:
    """The same for a base model, from its configurations and headers alone."""
    schedule, denoiser = files.configs["scheduler"], files.configs[files.denoiser]
    weights = {path for paths in files.weights.values() for path in paths}
    latents = 2 ** (len(files.configs["vae"]["block_out_channels"]) - 1)
    prediction = (
        "flow matching"
        if "FlowMatch" in schedule["_class_name"]
        else schedule.get("prediction_type", "epsilon")
    )
    facts = {
        "base model": f"{files.path.name}, {sum(path.stat().st_size for path in weights) / 1e6:,.1f} MB",
        "family": family_of(files).name,
        "layout": "a single file"
        if files.template
        else f"a diffusers folder{', its fp16 edition' if files.variant else ''}",
        "prediction": str(prediction or "not told by the file: set base.prediction").replace(
            "_prediction", ""
        ),
        "zero terminal SNR": "yes" if schedule.get("rescale_betas_zero_snr") else "no",
    }
    if side := denoiser.get("sample_size"):
        facts["made for"] = f"{side * latents} x {side * latents} pixels"
    for part, tensors in files.tensors.items():
        formats = ", ".join(
            sorted({info.dtype for info in tensors.values() if info.dtype not in ("I32", "I64")})
        )
        facts[COMPONENTS.get(part, "VAE")] = (
            f"{sum(info.numel for info in tensors.values()):,} parameters in {formats}"
        )
    return facts | ({"odd": " ".join(files.notes)} if files.notes else {})


def kind_counts(modules: Iterable[AdaptedModule]) -> dict[str, int]:
    """How many modules of each kind: {"LoRA": 32, "LoCon": 4}."""
    counts: Counter = Counter()
    for module in modules:
        kernel = module.to("meta").delta.shape[2:]
        name = KINDS[module.kind if module.kind in KINDS else "lora"]
        if name == "LoRA" and any(side > 1 for side in kernel):
            name = "LoCon"
        counts[
            f"DoRA ({name})"
            if "dora_scale" in module.tensors and name != "LoRA"
            else "DoRA"
            if "dora_scale" in module.tensors
            else name
        ] += 1
    return dict(counts.most_common())


def oddities(file: AdapterFile) -> list[str]:
    """Sentences about what a person may want to know before using it."""
    found = []
    if idle := [
        module.name
        for module in file.modules
        if not module.delta.any() and "dora_scale" not in module.tensors
    ]:
        found.append(
            f"{len(idle)} of {len(file.modules)} modules change nothing, such as {idle[0]}."
        )
    if any(abs(module.scale) > LARGEST_SCALE for module in file.modules):
        found.append("Its alpha is many times its rank; it may be far too strong at strength 1.")
    if not file.metadata:
        found.append("It has no metadata; A1111 may not list it.")
    return found


def _spread(values: Iterable[float]) -> str:
    counts = Counter(values)
    if not counts:
        return ""
    return f"{next(iter(counts)):g}" if len(counts) == 1 else f"{min(counts):g} to {max(counts):g}"

"""What an adapter file says and shows of itself: `python -m trainer info FILE`."""

from collections import Counter
from pathlib import Path

from trainer.export import read_adapter
from trainer.safetensors_header import read_header

COMPONENTS = {
    "lora_unet": "UNet",
    "unet": "UNet",
    "lora_te": "text encoder",
    "lora_te1": "text encoder",
    "lora_te2": "second text encoder",
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
    "transformer": "transformer",
    "base_model": "PEFT model",
}
FROM_METADATA = {
    "trained on": "ss_sd_model_name",
    "family": "ss_base_model_version",
    "trigger": "modelspec.trigger_phrase",
    "steps": "ss_steps",
    "pictures": "ss_num_train_images",
    "resolution": "modelspec.resolution",
    "learning rate": "ss_learning_rate",
    "preset": "atelier_preset",
    "made": "modelspec.date",
    "hash": "sshs_model_hash",
}


def describe(path: Path) -> dict[str, str]:
    """Facts for people, in the order in which they are read. Raises ModelError for a file that is no adapter."""
    tensors = read_adapter(path)
    metadata = read_header(path).metadata
    kohya = any(name.endswith("lora_down.weight") for name in tensors)
    downs = {name: tensor for name, tensor in tensors.items() if name.endswith(("lora_down.weight", "lora_A.weight"))}
    alphas = Counter(float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha"))
    parts = Counter(
        COMPONENTS.get(
            name.split("_text_model")[0] if kohya and "_text_model" in name else "lora_unet" if kohya else name.split(".")[0], "?"
        )
        for name in downs
    )
    facts = {
        "file": f"{path.name}, {path.stat().st_size / 1e6:.1f} MB, {next(iter(tensors.values())).dtype}".replace("torch.", ""),
        "dialect": "kohya (A1111, Forge, ComfyUI, InvokeAI, diffusers)" if kohya else "diffusers",
        "modules": ", ".join(f"{count} in the {part}" for part, count in parts.most_common()),
        "rank": _spread(Counter(tensor.shape[0] for tensor in downs.values())),
        "alpha": _spread(alphas) if alphas else "none in the file; readers take alpha = rank",
        "parameters": f"{sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith('.alpha')):,}",
    }
    return facts | {label: metadata[key] for label, key in FROM_METADATA.items() if metadata.get(key)}


def _spread(values: Counter) -> str:
    return f"{next(iter(values)):g}" if len(values) == 1 else f"{min(values):g} to {max(values):g}"

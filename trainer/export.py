"""The finished adapter as one .safetensors file in kohya's dialect, which every program reads.

Our own writer: the converters of diffusers and PEFT write names or alphas that others drop.
Keys, scale and metadata follow the table in docs/formats.md.
"""

import hashlib
import json
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from trainer import __version__
from trainer.adapted import AdaptedModule, kind_of
from trainer.config import RunConfig
from trainer.errors import ModelError
from trainer.families.base import ModelFamily
from trainer.files import atomic_write
from trainer.presets import load_presets
from trainer.safetensors_header import read_header

FOLDED = {
    "lora": "lora_up.weight",
    "dora": "lora_up.weight",
    "loha": "hada_w1_a",
    "lokr": "lokr_w1",
}  # the factor that takes up a scale of its own


def to_kohya(modules: Iterable[AdaptedModule], family: ModelFamily, alpha: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of each module (lora_down [r, in] and lora_up [out, r], or LyCORIS's) and alpha, one value for the whole file.

    Where a module's scale is not alpha / rank the difference is folded into one of its factors, in float32, since
    some readers look at one alpha only. Raises ModelError for a weight that is not finite.
    """
    tensors = {}
    for module in modules:
        key = family.export_key(module.component, module.name)
        fold = module.scale * module.rank / alpha if module.rank else module.scale  # readers scale no LoKr of two whole matrices
        for leaf, weights in module.tensors.items():
            folded = weights * fold if leaf == FOLDED[module.kind] else weights
            # The lengths of a DoRA stay exact: they multiply all of W, so their rounding would be as large as what was learned.
            tensors[f"{key}.{leaf}"] = folded.to(torch.float32 if leaf == "dora_scale" else dtype).contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return _finite(tensors)


def to_diffusers(modules: Iterable[AdaptedModule], family: ModelFamily, dtype: torch.dtype) -> dict[str, Tensor]:
    """Two tensors a module, lora_A [r, in] and lora_B [out, r]: without an alpha readers take it as the rank, so the scale is in lora_B."""
    tensors = {}
    for module in modules:
        key = family.export_key(module.component, module.name)
        tensors[f"{key}.lora_A.weight"] = module.tensors["lora_down.weight"].to(dtype).contiguous()
        tensors[f"{key}.lora_B.weight"] = (module.tensors["lora_up.weight"] * module.scale).to(dtype).contiguous()
    return _finite(tensors)


def to_file(modules: Iterable[AdaptedModule], family: ModelFamily, alpha: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """In the dialect of the family. Raises ModelError for a weight that is not finite."""
    return to_diffusers(modules, family, dtype) if family.dialect == "diffusers" else to_kohya(modules, family, alpha, dtype)


def _finite(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ModelError(
            f"The adapter holds numbers that are not finite (in {broken[0]}), so it was not saved. "
            "Lower the learning rate, or save in fp32 if the values are only too large for fp16."
        )
    return tensors


def write_adapter(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes the file whole, with the hashes by which A1111 and Civitai know it."""
    plain = save(tensors)
    body = plain[8 + struct.unpack("<Q", plain[:8])[0] :]
    digest = hashlib.sha256(body).hexdigest()
    atomic_write(path, save(tensors, {**metadata, "sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}))


def metadata_for(
    run: RunConfig,
    family: ModelFamily,
    *,
    step: int,
    total_steps: int,
    pictures: int,
    captions: list[str],
    base_hash: str,
    prediction_type: str,
    started: float,
    finished: float,
) -> dict[str, str]:
    """What the file says of itself (sd-scripts' ss_* and Stability's modelspec 1.0.1); all values are texts."""
    training, adapter, side = run.training, run.adapter, run.dataset.resolution
    base_name = Path(run.base.model).name
    values: dict[str, Any] = {
        **family.metadata(prediction_type),
        "ss_network_module": "lycoris.kohya" if adapter.kind in ("dora", "loha", "lokr") else "networks.lora",
        "ss_network_dim": adapter.rank,
        "ss_network_alpha": adapter.alpha,
        "ss_network_dropout": adapter.dropout,
        "ss_output_name": run.name,
        "ss_sd_model_name": base_name,
        "ss_sd_model_hash": base_hash,
        "ss_resolution": f"({side}, {side})",
        "ss_clip_skip": run.base.clip_skip if run.base.clip_skip > 1 else "None",
        "ss_max_token_length": run.dataset.caption_tokens if run.dataset.caption_tokens > 75 else "None",
        "ss_num_train_images": pictures,
        "ss_steps": step,
        "ss_max_train_steps": total_steps,
        "ss_batch_size_per_device": training.batch_size,
        "ss_gradient_accumulation_steps": training.gradient_accumulation_steps,
        "ss_gradient_checkpointing": training.gradient_checkpointing,
        "ss_learning_rate": training.learning_rate,
        "ss_unet_lr": training.learning_rate,
        "ss_text_encoder_lr": training.text_encoder_learning_rate,
        "ss_optimizer": training.optimizer,
        "ss_lr_scheduler": training.lr_schedule,
        "ss_seed": training.seed,
        "ss_min_snr_gamma": run.objective.min_snr_gamma,
        "ss_noise_offset": run.objective.noise_offset,
        "ss_caption_dropout_rate": run.dataset.caption_dropout,
        "ss_training_started_at": started,
        "ss_training_finished_at": finished,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": run.name,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else prediction_type,
        "modelspec.date": datetime.fromtimestamp(finished, UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.usage_hint": f"Trained on {base_name}. Start at strength 0.8 to 1.",
        "atelier_version": __version__,
        "atelier_config": shared_config(run),
        "atelier_preset": run.preset,
        "atelier_preset_hash": load_presets()[run.preset].hash if run.preset in load_presets() else "",
    }
    if run.dataset.trigger:
        values["modelspec.trigger_phrase"] = run.dataset.trigger
    if run.saving.include_captions:
        folder = Path(run.dataset.folder).name
        values["ss_tag_frequency"] = json.dumps({folder: tag_frequencies(captions)}, ensure_ascii=False)
        values["ss_dataset_dirs"] = json.dumps({folder: {"n_repeats": 1, "img_count": pictures}}, ensure_ascii=False)
    return {key: str(value) for key, value in values.items()}


def shared_config(run: RunConfig) -> str:
    """The settings as JSON, to repeat the run; without paths, and without prompts unless captions may be told."""
    data = run.model_dump(mode="json")
    data["dataset"]["folder"] = ""
    for name in ("model", "vae"):
        path = Path(data["base"][name])
        data["base"][name] = path.name if path.is_absolute() else data["base"][name]
    if not run.saving.include_captions:
        data["sampling"].update(prompts=[], negative_prompt="")
    return json.dumps(data, ensure_ascii=False)


def tag_frequencies(captions: Iterable[str]) -> dict[str, int]:
    """How often each comma-separated part of the captions occurs."""
    return dict(Counter(tag for caption in captions for tag in (part.strip() for part in caption.split(",")) if tag).most_common())


UP = ("lora_up.weight", "lora_B.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a")  # one of these is in every adapter


def read_adapter(path: Path) -> dict[str, Tensor]:
    """The tensors of an adapter file, checked. Raises ModelError for a file that is damaged or no adapter."""
    header = read_header(path)
    if not any(name.endswith(UP) for name in header.tensors):
        raise ModelError(f"{path.name} is no LoRA: it holds {len(header.tensors)} tensors, and none is a low-rank pair.")
    tensors = load_file(path)
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ModelError(f"{path.name} holds numbers that are not finite (in {broken[0]}); it would only make black pictures.")
    return tensors


def deltas(tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """delta W by kohya key, float64. `weights` holds the base's W by the same keys, which all but plain LoRA need."""
    by_key: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        key, _, leaf = name.partition(".")
        by_key.setdefault(key, {})[leaf] = tensor.double()
    result = {}
    for key, leaves in by_key.items():
        alpha = float(leaves.pop("alpha"))
        module = AdaptedModule("", key, kind_of(leaves), leaves, 1.0)
        module = replace(module, scale=alpha / module.rank if module.rank else 1.0)
        result[key] = module.delta if weights is None else module.change(weights[key])
    return result


def copy_adapter(source: Path, target: Path) -> None:
    """The same file under another name, whole or not at all."""
    atomic_write(target, source.read_bytes())

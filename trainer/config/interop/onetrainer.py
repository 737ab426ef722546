"""OneTrainer (JSON). It saves every field, including those that a switch turns off.

Source of the names and defaults: https://github.com/Nerogar/OneTrainer,
`modules/util/config/TrainConfig.py`.
"""

import re
from collections.abc import Mapping
from typing import Any

from trainer.config.interop import translation
from trainer.config.interop.translation import (
    Changes,
    ForeignSettings,
    Rule,
    Table,
    number,
    number_or_zero,
    whole_number,
)

SIGNS = {"training_method", "base_model_name", "lora_rank"}
"""A file with any of these names is one of OneTrainer's."""

KINDS = {"LORA": "lora", "DORA": "dora", "LOHA": "loha", "LOKR": "lokr"}


def matches(data: Mapping[str, Any]) -> bool:
    return bool(SIGNS & data.keys())


def read(data: Mapping[str, Any]) -> ForeignSettings:
    flat = translation.without_empty(translation.flatten(data))
    model = str(flat.get("model_type"))
    denoiser = "transformer" if model.startswith("STABLE_DIFFUSION_3") else "unet"

    # Settings whose meaning depends on others become independent ones first.
    _resolve_learning_rates(flat, model, denoiser)
    _resolve_text_encoder_end(flat)
    flat.setdefault("gradient_checkpointing", flat.get(f"{denoiser}.gradient_checkpointing"))
    if flat.pop("ema", "OFF") == "OFF":
        flat["ema_decay"] = 0
    loss_weight = flat.pop("loss_weight_fn", "CONSTANT")
    flat[f"loss_weight.{loss_weight}"] = flat.pop("loss_weight_strength", 5.0)
    if not flat.get("masked_training"):
        flat.pop("unmasked_weight", None)
    flat = _resolve_kind(flat)
    pattern = _take_layer_filter(flat)

    layers = translation.layers(pattern=pattern) if pattern else translation.layers("linear+conv")
    changes, unsupported = translation.translate(TABLE, translation.without_empty(flat))
    if not pattern:
        unsupported.append(translation.OUTER_LAYERS)
    return ForeignSettings("OneTrainer", layers | changes, unsupported)


def _resolve_learning_rates(flat: dict[str, Any], model: str, denoiser: str) -> None:
    """Replaces the common learning rate and the switches of the parts by a rate for each part."""
    parts = {"unet_rate": denoiser, "text_rate": "text_encoder"}
    if denoiser == "transformer" or "XL" in model:
        parts["text_rate_2"] = "text_encoder_2"
    common = flat.pop("learning_rate", None)
    for name, part in parts.items():
        is_trained = flat.get(f"{part}.train", True)
        flat[name] = flat.get(f"{part}.learning_rate", common) if is_trained else 0


def _resolve_text_encoder_end(flat: dict[str, Any]) -> None:
    """Replaces the epoch at which the text encoders stop by a fraction of the run."""
    end = number_or_zero(flat, "text_encoder.stop_training_after")
    epochs = number_or_zero(flat, "epochs")
    unit = flat.get("text_encoder.stop_training_after_unit", "EPOCH")
    flat["text_until"] = 1
    if not end or unit == "NEVER" or not number_or_zero(flat, "text_rate"):
        return
    if unit == "EPOCH" and epochs and number_or_zero(flat, "unet_rate"):
        flat["text_until"] = min(1.0, end / epochs)
    else:
        flat["stop_training_after"] = f"{end:g} {unit}"


def _resolve_kind(flat: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings with one kind, its rank, and no settings of other kinds."""
    kind = flat.setdefault("peft_type", "LORA")
    if flat.pop("lora_decompose", False) and kind == "LORA":
        flat["peft_type"] = "DORA"
    unused = ["oft_", "dora_oft"]
    if kind == "LOKR":
        flat["lora_rank"] = flat.pop("lokr_dim", 16)
    else:
        unused.append("lokr_")
    return {name: value for name, value in flat.items() if not name.startswith(tuple(unused))}


def _take_layer_filter(flat: dict[str, Any]) -> str:
    """Removes the filter of layers, and returns it as one regular expression."""
    text = str(flat.pop("layer_filter", flat.pop("lora_layers", "")))
    is_regex = flat.pop("layer_filter_regex", flat.pop("lora_layers_regex", False))
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return "|".join(parts if is_regex else map(re.escape, parts))


def _thousandths(path: str) -> Rule:
    """OneTrainer gives the strength of the noise as a fraction."""
    return lambda value: {path: round(1000 * float(value))}


def _min_snr(strength: Any) -> Changes:
    return {"objective.weighting": "min_snr", "objective.min_snr_gamma": float(strength)}


def _p2(strength: Any) -> Changes:
    return {"objective.weighting": "p2", "objective.p2_gamma": float(strength)}


TABLE = Table(
    rules={
        "base_model_name": "base.model",
        "train_dtype": translation.precision("base.precision"),
        "output_dtype": translation.precision("saving.precision"),
        "output_model_destination": translation.output_name,
        "vae.model_name": "base.vae",
        "force_v_prediction": translation.v_prediction,
        "rescale_noise_scheduler_to_zero_terminal_snr": translation.zero_terminal_snr,
        "resolution": translation.resolutions,
        "masked_training": lambda value: {"dataset.masked_loss": "mask" if value else "off"},
        "unmasked_weight": number("dataset.mask_outside"),
        "peft_type": lambda value: {"adapter.kind": KINDS[value]},
        "lokr_decompose_factor": translation.lokr_factor,
        "lora_rank": whole_number("adapter.rank"),
        "lora_alpha": number("adapter.alpha"),
        "dropout_probability": number("adapter.dropout"),
        "unet_rate": number("training.learning_rate"),
        "text_rate": number("training.text_encoder_learning_rate"),
        "text_rate_2": number("training.text_encoder_2_learning_rate"),
        "text_until": number("training.text_encoder_until"),
        "learning_rate_scheduler": translation.lr_schedule,
        "learning_rate_warmup_steps": number("training.warmup"),
        "learning_rate_cycles": whole_number("training.lr_cycles"),
        "optimizer.optimizer": translation.optimizer,
        "optimizer.weight_decay": number("training.weight_decay"),
        "epochs": translation.epochs,
        "batch_size": whole_number("training.batch_size"),
        "gradient_accumulation_steps": whole_number("training.gradient_accumulation_steps"),
        "gradient_checkpointing": lambda value: {
            "training.gradient_checkpointing": value not in ("OFF", False)
        },
        "clip_grad_norm": number("training.max_grad_norm"),
        "seed": whole_number("training.seed"),
        "loss_weight.CONSTANT": lambda _: _min_snr(0),
        "loss_weight.MIN_SNR_GAMMA": _min_snr,
        "loss_weight.DEBIASED_ESTIMATION": lambda _: {"objective.weighting": "debiased"},
        "loss_weight.P2": _p2,
        "min_noising_strength": _thousandths("objective.min_timestep"),
        "max_noising_strength": _thousandths("objective.max_timestep"),
        "offset_noise_weight": number("objective.noise_offset"),
        "perturbation_noise_weight": number("objective.input_perturbation"),
        "ema_decay": number("training.ema_decay"),
        "text_encoder_layer_skip": lambda value: {"base.clip_skip": int(value) + 1},
    },
    ignored=translation.names(
        r"""
        __version training_method model_type workspace_dir cache_dir debug\w* tensorboard\w*
        validation\w* concept\w* sample\w* backup\w* save_\w+ output_model_format rolling\w*
        dataloader_threads train_device temp_device latent_caching clear_cache\w*
        aspect_ratio_bucketing include_train_config .*weight_dtype fallback_train_dtype unet\..*
        (unconditional_)?transformer\..* text_encoder(_\d)?\..* prior\..* vae\..*
        (effnet_encoder|decoder\w*|quantization|optimizer(_defaults)?)\..* enable_\w+
        layer_filter_preset lora_layer_preset multi_gpu device_indexes only_cache secrets.*
        attention_mechanism cloud\..* .*_filename .*offload.* compile frames embedding\..*
        non_blocking gradient_\w+ async_\w+ fused_gradient_reduce image_caching text_caching
        caching_threads prefetch_\w+ prevent_overwrites non_ema_sampling .*_sequence_length
        """
    ),
    neutral={
        "learning_rate_scaler": "NONE",
        "learning_rate_min_factor": 0.0,
        "mse_strength": 1.0,
        "timestep_distribution": "UNIFORM",
        "vb_loss_strength": 1.0,
        "huber_delta": 1.0,
        "timestep_shift": 1.0,
        "ema_update_step_interval": 5,
        "loss_scaler": "NONE",
        "unmasked_probability": 0.1,
        "lora_decompose_norm_epsilon": True,
        "bundle_additional_embeddings": True,
        "lokr_dora_on_output": True,
        "lokr_vec_trick": True,
    },
)

"""The metadata that sd-scripts writes into a finished adapter: kohya's settings, all as text."""

import json
import re
from collections.abc import Mapping
from typing import Any

from trainer.config.interop import kohya, translation
from trainer.config.interop.translation import ForeignSettings
from trainer.errors import ConfigError

SAME_NAME = """
    network_dim network_alpha network_module network_dropout learning_rate unet_lr text_encoder_lr
    lr_scheduler lr_warmup_steps seed resolution min_snr_gamma noise_offset
    noise_offset_random_strength ip_noise_gamma multires_noise_iterations multires_noise_discount
    zero_terminal_snr loss_type huber_schedule huber_c output_name gradient_accumulation_steps
    gradient_checkpointing mixed_precision max_grad_norm scale_weight_norms clip_skip
    max_token_length caption_dropout_rate caption_tag_dropout_rate shuffle_caption keep_tokens
    flip_aug random_crop prior_loss_weight
"""
"""Settings whose key in the metadata is their name after "ss_"."""

KOHYA_NAMES = {
    "ss_steps": "max_train_steps",
    "ss_batch_size_per_device": "train_batch_size",
    "ss_debiased_estimation": "debiased_estimation_loss",
} | {f"ss_{name}": name for name in SAME_NAME.split()}
"""kohya's name of a setting by its key in the metadata."""

VALUES = {"None": None, "True": True, "False": False}
"""Python values that are written as text."""


def matches(data: Mapping[str, Any]) -> bool:
    return "ss_network_dim" in data


def read(data: Mapping[str, Any]) -> ForeignSettings:
    settings: dict[str, Any] = {}
    for key, value in data.items():
        if key in KOHYA_NAMES and isinstance(value, str):
            settings[KOHYA_NAMES[key]] = VALUES.get(value, value)
    settings["network_args"] = _network_arguments(data)
    # Such as "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1,betas=(0.9, 0.99))".
    optimizer, _, arguments = str(data.get("ss_optimizer") or "").partition("(")
    if optimizer:
        settings["optimizer"] = optimizer.rpartition(".")[2]
        pair = r"\w+=(?:\([^()]*\)|\[[^\[\]]*\]|[^,()]+)"
        settings["optimizer_args"] = re.findall(pair, arguments)
    changes, unsupported = kohya.translate(settings)
    trigger = data.get("modelspec.trigger_phrase")
    if trigger:
        changes["dataset.trigger"] = trigger
    return ForeignSettings("the metadata of the adapter", changes, unsupported)


def _network_arguments(data: Mapping[str, Any]) -> Any:
    text = data.get("ss_network_args") or "{}"
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        setting = translation.setting_text("ss_network_args", text)
        raise ConfigError(
            f"{setting} is not a table of arguments in JSON. Correct it or remove it."
        ) from None

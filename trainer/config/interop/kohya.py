"""kohya_ss (JSON) and sd-scripts (TOML).

The two programs share the names of their settings. Source of the defaults and of the meanings:
https://github.com/kohya-ss/sd-scripts, `library/train_util.py` and `networks/lora.py`.
"""

import re
from collections.abc import Mapping
from typing import Any

from trainer.config.interop import translation
from trainer.config.interop.translation import (
    Changes,
    ForeignSettings,
    Table,
    number,
    number_or_zero,
    whole_number,
)

SIGNS = {
    "network_dim",
    "network_module",
    "pretrained_model_name_or_path",
    "max_train_steps",
    "network_alpha",
}
"""A file with any of these names is one of kohya's."""

ABSENT = {
    "network_alpha": 1,
    "lr_scheduler": "constant",
    "min_snr_gamma": 0,
    "noise_offset": 0,
    "ip_noise_gamma": 0,
    "scale_weight_norms": 0,
    "network_dropout": 0,
    "loss_type": "l2",
}
"""The values that sd-scripts uses for absent settings, if they differ from the defaults here."""

LENGTHS = ("max_train_epochs", "max_train_steps", "epoch")
"""Settings for the length of a run. The first one above 0 counts."""

TRANSFORMERS = r"attentions\."
"""Matches the paths of every Transformer2DModel of a UNet, by the names in diffusers."""

KINDS = {
    "lora": "lora",
    "standard": "lora",
    "kohya locon": "lora",
    "locon": "lora",
    "kohya": "lora",
    "loha": "loha",
    "lokr": "lokr",
}
"""Kinds of adapters by algorithm: the end of a module or of a type in the form, or `algo`."""

NETWORK_ARGUMENTS = {
    "dropout": "network_dropout",
    "preset": "LyCORIS_preset",
    "algo": "algo",
    "conv_dim": "conv_dim",
    "conv_alpha": "conv_alpha",
    "rank_dropout": "rank_dropout",
    "module_dropout": "module_dropout",
    "dora_wd": "dora_wd",
    "factor": "factor",
}
"""Names in `network_args` that are supported, by the name of the same setting in the form."""


def matches(data: Mapping[str, Any]) -> bool:
    return bool(SIGNS & _without_sections(data).keys())


def read(data: Mapping[str, Any]) -> ForeignSettings:
    changes, unsupported = translate(_without_sections(data))
    return ForeignSettings("kohya", changes, unsupported)


def translate(settings: Mapping[str, Any]) -> tuple[Changes, list[str]]:
    """Returns the changes and the unsupported settings of a flat table of settings."""
    data = ABSENT | translation.without_empty(settings)
    # Settings whose meaning depends on others become independent ones first.
    changes = _take_network(data)
    debiased = data.pop("debiased_estimation_loss", False)
    changes["objective.weighting"] = "debiased" if debiased else "min_snr"
    _resolve_learning_rates(data)
    _resolve_noise(data)
    _resolve_length(data)
    _resolve_warmup(data)
    if data.get("shuffle_caption") or number_or_zero(data, "caption_tag_dropout_rate"):
        data.setdefault("keep_tokens", 0)
    translated, unsupported = translation.translate(TABLE, data)
    return changes | translated, unsupported


def _without_sections(data: Mapping[str, Any]) -> dict[str, Any]:
    """Merges the sections of a TOML file, which sd-scripts ignores."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat |= {str(name): inner for name, inner in value.items()}
        else:
            flat[str(key)] = value
    return flat


def _take_network(data: dict[str, Any]) -> Changes:
    """Removes the settings of the network, and returns its kind and its layers as changes.

    The numbers of the network (rank, alpha, dropout) stay in `data` under the form's names.
    """
    arguments = data.pop("network_args", {})
    if not isinstance(arguments, dict):
        arguments = _pairs(arguments)
    form_type = data.pop("LoRA_type", None)
    module = data.pop("network_module", "networks.lora")
    name = str(form_type or module).lower()
    is_lycoris = name.startswith("lycoris")
    if not is_lycoris and name != "kohya locon":
        # The form saves the numbers of every type. These two belong to types that are not chosen.
        data.pop("conv_dim", None)
        data.pop("conv_alpha", None)
    for argument, value in arguments.items():
        data[NETWORK_ARGUMENTS.get(argument, f"network_args.{argument}")] = value
    algorithm = str(data.pop("algo", None) or re.split(r"[./]", name)[-1]).lower()
    if algorithm not in KINDS:
        # Put back, so that it is reported as unsupported.
        setting = "LoRA_type" if form_type else "network_module"
        data[setting] = f"{form_type or module} ({algorithm})"
        return {}
    kind = KINDS[algorithm]
    if kind == "lora" and str(data.get("dora_wd")).lower() == "true":
        kind = "dora"
        del data["dora_wd"]
    if kind != "lokr":
        data.pop("factor", None)
    return {"adapter.kind": kind} | _take_layers(data, is_lycoris)


def _take_layers(data: dict[str, Any], is_lycoris: bool) -> Changes:
    """Removes the settings that choose the layers of a network, and returns them as changes.

    sd-scripts trains the layers of each Transformer2DModel, and with a `conv_dim` also the
    layers of each ResnetBlock2D and of the samplers. LyCORIS trains all of them, except with its
    preset attn-mlp.
    """
    convolutions = is_lycoris
    if "conv_dim" in data:
        convolutions = number_or_zero(data, "conv_dim") > 0
    if not convolutions:
        data.pop("conv_alpha", None)
    elif "conv_dim" in data:
        data.setdefault("conv_alpha", data["network_alpha"] if is_lycoris else 1)
    preset = data.get("LyCORIS_preset")
    if preset in ("full", "attn-mlp"):
        del data["LyCORIS_preset"]
    only_transformers = preset == "attn-mlp" if is_lycoris else not convolutions
    if only_transformers:
        return translation.layers(pattern=TRANSFORMERS)
    return translation.layers("linear+conv" if convolutions else "linear")


def _resolve_learning_rates(data: dict[str, Any]) -> None:
    """Replaces the common learning rate by one for the UNet and one for the text encoder.

    The form saves 0 for both if the common one is meant; otherwise 0 leaves a part untrained.
    """
    common = data.pop("learning_rate", None)
    if data.get("unet_lr") == data.get("text_encoder_lr") == 0:
        del data["unet_lr"], data["text_encoder_lr"]
    if common is not None:
        for name in ("unet_lr", "text_encoder_lr"):
            data.setdefault(name, common)
    if data.pop("network_train_unet_only", False):
        data["text_encoder_lr"] = 0
    if data.pop("network_train_text_encoder_only", False):
        data["unet_lr"] = 0


def _resolve_noise(data: dict[str, Any]) -> None:
    """Keeps the numbers of the chosen kind of noise. The form saves both kinds."""
    chosen = data.pop("noise_offset_type", None)
    if chosen == "Original":
        data.pop("multires_noise_iterations", None)
    elif chosen == "Multires":
        data["noise_offset"] = 0
    if not number_or_zero(data, "multires_noise_iterations"):
        data["multires_noise_discount"] = 0
    # Here there are as many iterations as the size of the image allows.
    data.pop("multires_noise_iterations", None)
    if not number_or_zero(data, "noise_offset"):
        data.pop("noise_offset_random_strength", None)


def _resolve_length(data: dict[str, Any]) -> None:
    """Keeps the length that counts, if several are given."""
    given = [name for name in LENGTHS if number_or_zero(data, name) > 0]
    for name in LENGTHS:
        if name not in given[:1]:
            data.pop(name, None)


def _resolve_warmup(data: dict[str, Any]) -> None:
    """Replaces the warm-up in percent, which the form saves, by a fraction of the steps."""
    fraction = number_or_zero(data, "lr_warmup") / 100
    data.pop("lr_warmup", None)
    if data["lr_scheduler"] == "constant":
        # Only constant_with_warmup has a warm-up there.
        data["lr_warmup_steps"] = 0
    elif not number_or_zero(data, "lr_warmup_steps"):
        data["lr_warmup_steps"] = fraction


def _pairs(value: Any) -> dict[str, str]:
    """Reads "weight_decay=0.1 betas=0.9,0.99", given as one text or as a list."""
    words = value.split() if isinstance(value, str) else value
    pairs = {}
    for word in words if isinstance(words, list) else []:
        name, _, text = str(word).partition("=")
        pairs[name.strip()] = text.strip()
    return pairs


def _text_encoder_learning_rates(value: Any) -> Changes:
    """Takes one number, or a list with one number for each text encoder."""
    first, *others = (float(text) for text in re.findall(r"[^\s,\[\]'\"]+", str(value)))
    return {
        "training.text_encoder_learning_rate": first,
        "training.text_encoder_2_learning_rate": others[0] if others else -1.0,
    }


def _optimizer_arguments(value: Any) -> Changes:
    """Takes the weight decay as a setting, and everything else as arguments."""
    pairs = _pairs(value)
    changes: Changes = {}
    if "weight_decay" in pairs:
        changes["training.weight_decay"] = float(pairs.pop("weight_decay"))
    arguments = []
    for name, text in pairs.items():
        is_bare_list = "," in text and not text.startswith(("(", "["))
        arguments.append(f"{name}=({text})" if is_bare_list else f"{name}={text}")
    if arguments:
        changes["training.optimizer_args"] = arguments
    return changes


TABLE = Table(
    rules={
        "pretrained_model_name_or_path": "base.model",
        "vae": "base.vae",
        "v_parameterization": translation.v_prediction,
        "clip_skip": whole_number("base.clip_skip"),
        "max_token_length": whole_number("dataset.caption_tokens"),
        "zero_terminal_snr": translation.zero_terminal_snr,
        "mixed_precision": translation.precision("base.precision"),
        "save_precision": translation.precision("saving.precision"),
        "output_name": translation.output_name,
        "train_data_dir": "dataset.folder",
        "resolution": translation.resolution,
        "max_resolution": translation.resolution,
        "bucket_reso_steps": whole_number("dataset.bucket_step"),
        "bucket_no_upscale": lambda value: {"dataset.allow_upscale": not value},
        "caption_dropout_rate": number("dataset.caption_dropout"),
        "caption_tag_dropout_rate": number("dataset.tag_dropout"),
        "shuffle_caption": "dataset.shuffle_tags",
        "keep_tokens": whole_number("dataset.keep_tags"),
        "enable_wildcard": "dataset.caption_wildcards",
        "flip_aug": "dataset.flip",
        "random_crop": "dataset.random_crop",
        "masked_loss": lambda value: {"dataset.masked_loss": "mask"} if value else {},
        "alpha_mask": lambda value: {"dataset.masked_loss": "alpha"} if value else {},
        "reg_data_dir": "dataset.regularisation_folder",
        "prior_loss_weight": number("dataset.prior_loss_weight"),
        "network_dim": whole_number("adapter.rank"),
        "network_alpha": number("adapter.alpha"),
        "network_dropout": number("adapter.dropout"),
        "conv_dim": whole_number("adapter.conv_rank"),
        "conv_alpha": number("adapter.conv_alpha"),
        "factor": translation.lokr_factor,
        "scale_weight_norms": number("adapter.max_norm"),
        "rank_dropout": number("adapter.rank_dropout"),
        "module_dropout": number("adapter.module_dropout"),
        "unet_lr": number("training.learning_rate"),
        "text_encoder_lr": _text_encoder_learning_rates,
        "lr_scheduler": translation.lr_schedule,
        "lr_scheduler_num_cycles": whole_number("training.lr_cycles"),
        "lr_scheduler_power": number("training.lr_power"),
        "lr_warmup_steps": number("training.warmup"),
        "optimizer": translation.optimizer,
        "optimizer_type": translation.optimizer,
        "optimizer_args": _optimizer_arguments,
        "max_train_steps": whole_number("training.steps"),
        "max_train_epochs": translation.epochs,
        "epoch": translation.epochs,
        "train_batch_size": whole_number("training.batch_size"),
        "gradient_accumulation_steps": whole_number("training.gradient_accumulation_steps"),
        "gradient_checkpointing": "training.gradient_checkpointing",
        "max_grad_norm": number("training.max_grad_norm"),
        "seed": whole_number("training.seed"),
        "min_snr_gamma": number("objective.min_snr_gamma"),
        "noise_offset": number("objective.noise_offset"),
        "noise_offset_random_strength": "objective.noise_offset_random",
        "multires_noise_discount": number("objective.pyramid_noise"),
        "ip_noise_gamma": number("objective.input_perturbation"),
        "loss_type": "objective.loss",
        "huber_c": number("objective.huber_c"),
        "huber_schedule": "objective.huber_schedule",
        "min_timestep": whole_number("objective.min_timestep"),
        "max_timestep": whole_number("objective.max_timestep"),
        "sample_prompts": translation.sample_prompts,
    },
    ignored=translation.names(
        r"""
        additional_parameters async_upload bucket_\w+ cache_\w+ caption_extension
        caption_metadata\w* console_\w+ debug\w* dynamo_\w+ enable_bucket extra_accelerate\w*
        full_\w+ gpu_ids huggingface_\w* log_\w+ logging_dir lowram main_process_port
        max_bucket_reso max_data_loader\w* mem_eff_attn metadata_\w+ min_bucket_reso model_list
        multi_gpu no_half_vae num_\w+ output_dir persistent\w* resume\w* sample_every\w*
        sample_sampler save_(as|every|last|model|state)\w* sdxl\w* sdpa training_comment
        use_wandb v2 wandb\w* xformers
        """
    ),
    neutral={"huber_scale": 1, "unit": 1},
)

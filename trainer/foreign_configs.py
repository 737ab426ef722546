"""Settings of other trainers as changes to a `RunConfig`: kohya_ss and sd-scripts (JSON, TOML), OneTrainer (JSON), ai-toolkit (YAML).

Each trainer is a table of its names. What has no counterpart here is listed, never dropped without a word; what only says how that
program works (caches, folders, its window) is left out quietly.
"""

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from trainer import config
from trainer.config import RunConfig
from trainer.errors import ConfigError

SIZE_LIMIT = 1_000_000  # characters
OFF: tuple[Any, ...] = (None, "", 0, False, "none", "None", "NONE", "OFF", [], {})

Rule = str | Callable[[Any], dict[str, Any]]
"""A dotted path that takes the value as it is, or what makes changes of it; an error for what has no counterpart."""


@dataclass(frozen=True)
class Foreign:
    """What a file of another trainer asks for."""

    program: str
    changes: dict[str, Any] = field(default_factory=dict)
    """By dotted path."""
    left_out: list[str] = field(default_factory=list)
    """A sentence part for each setting that has no counterpart: "network_args = conv_dim=4"."""


def read(text: str) -> Foreign:
    """Recognises the trainer by the names in the file. Raises ConfigError for what is no such file."""
    if len(text) > SIZE_LIMIT:
        raise ConfigError("The file is too large for a list of settings.")
    data = _parse(text)
    if isinstance(data.get("config"), dict) and isinstance(data["config"].get("process"), list) and data["config"]["process"]:
        return _ai_toolkit(data["config"])
    if "training_method" in data or "base_model_name" in data or "lora_rank" in data:
        return _translate("OneTrainer", _flatten(data), ONE_TRAINER, ONE_TRAINER_QUIET, ONE_TRAINER_DEFAULTS)
    if "ss_network_dim" in data:
        return _from_metadata(data)
    if isinstance(data.get("parameters"), str):
        return _from_picture(data["parameters"])
    flat = _without_sections(data)
    if KOHYA.keys() & flat.keys() & {"network_dim", "network_module", "pretrained_model_name_or_path", "max_train_steps", "network_alpha"}:
        return _kohya(flat)
    raise ConfigError("These are settings of no trainer that is known here: kohya_ss, sd-scripts, OneTrainer and ai-toolkit are.")


def apply(foreign: Foreign, run: RunConfig) -> tuple[RunConfig, list[str]]:
    """The run with the changes, and all that could not be carried over, those included that do not fit together."""
    left_out = list(foreign.left_out)
    known = dict(config.fields())
    changes = {}
    for path, value in foreign.changes.items():
        try:
            if path not in known:
                raise ConfigError(path)
            config.replace(run, {path: value})
        except ConfigError as error:
            if "\n- " + path in str(error) or path not in known:  # not a contradiction, which other changes may solve
                left_out.append(f"{path} = {value}")
                continue
        changes[path] = value
    try:
        return config.replace(run, changes), left_out
    except ConfigError as error:
        raise ConfigError(f"The settings from {foreign.program} do not fit together. {error}") from None


def _parse(text: str) -> dict[str, Any]:
    for reader in (json.loads, tomllib.loads, yaml.safe_load):
        try:
            data = reader(text)
        except (ValueError, yaml.YAMLError, RecursionError):
            continue
        if isinstance(data, dict):
            return data
    raise ConfigError("The file is neither JSON nor TOML nor YAML.")


def _translate(program: str, data: Mapping[str, Any], rules: Mapping[str, Rule], quiet: re.Pattern, defaults: Mapping[str, Any]) -> Foreign:
    changes: dict[str, Any] = {}
    left_out = []
    for name, value in data.items():
        rule = rules.get(name)
        if rule is None:
            if value not in OFF and defaults.get(name) != value and not quiet.fullmatch(name):
                left_out.append(_shown(name, value))
            continue
        if value is None or value == "":
            continue
        try:
            changes |= {rule: value} if isinstance(rule, str) else rule(value)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            left_out.append(_shown(name, value))
    return Foreign(program, changes, left_out)


def _shown(name: str, value: Any) -> str:
    return f"{name} = {str(value).strip()[:80]}"


def _without_sections(data: Mapping[str, Any]) -> dict[str, Any]:
    """sd-scripts ignores the sections of its TOML."""
    return {name: value for key, part in data.items() for name, value in (part.items() if isinstance(part, dict) else [(key, part)])}


def _flatten(data: Mapping[str, Any], front: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flatten(value, f"{front}{key}.") if isinstance(value, dict) else {f"{front}{key}": value}
    return flat


# -- values that several trainers write in the same words --

OPTIMIZERS = {
    "adamw": "adamw", "adam": "adamw", "adamw8bit": "adamw8bit", "adamw_8bit": "adamw8bit", "adafactor": "adafactor", "lion": "lion",
    "prodigy": "prodigy", "adamwschedulefree": "schedule_free_adamw", "schedule_free_adamw": "schedule_free_adamw",
}  # fmt: skip
SCHEDULES = {"constant", "linear", "cosine", "cosine_with_restarts", "polynomial"}
PRECISIONS = {"fp16": "fp16", "float16": "fp16", "float_16": "fp16", "bf16": "bf16", "bfloat16": "bf16", "bfloat_16": "bf16",
              "fp32": "fp32", "float32": "fp32", "float": "fp32", "float_32": "fp32", "no": "fp32"}  # fmt: skip


def _optimizer(value: str) -> dict[str, Any]:
    return {"training.optimizer": OPTIMIZERS[value.lower()]}


def _schedule(value: str) -> dict[str, Any]:
    name = value.lower().removesuffix("_with_warmup")
    if name not in SCHEDULES:
        raise ValueError(value)
    return {"training.lr_schedule": name}


def _precision(path: str) -> Rule:
    return lambda value: {path: PRECISIONS[value.lower()]}


def _number(path: str, kind: type = float) -> Rule:
    return lambda value: {path: kind(float(value))}


def _name(value: str) -> dict[str, Any]:
    return {"name": re.split(r"[/\\]", value)[-1].removesuffix(".safetensors")[:80]}


def _resolution(value: Any) -> dict[str, Any]:
    sides = [int(side) for side in re.findall(r"\d+", str(value))]
    return {"dataset.resolution": round((sides[0] * sides[-1]) ** 0.5 / 8) * 8}


def _prompts(value: Any) -> dict[str, Any]:
    """sd-scripts writes options behind a prompt ("--n ugly --w 512"); only the text is taken."""
    lines = value.splitlines() if isinstance(value, str) else [line["prompt"] if isinstance(line, dict) else line for line in value]
    texts = [re.split(r"\s--\w", line)[0].strip() for line in lines]
    if any(text.endswith((".txt", ".toml", ".json")) for text in texts):
        raise ValueError("a file of prompts")
    return {"sampling.prompts": [text for text in texts if text and not text.startswith("#")][:16]}


# -- kohya_ss and sd-scripts --


def _kohya(data: dict[str, Any]) -> Foreign:
    """Its rates are a common one and two that take its place; its alpha is 1 where none is given."""
    data = dict(data)
    data.setdefault("network_alpha", 1)
    common = data.pop("learning_rate", None)
    if data.get("unet_lr") in OFF and common is not None:
        data["unet_lr"] = common
    text_only, unet_only = data.pop("network_train_text_encoder_only", False), data.pop("network_train_unet_only", False)
    if unet_only:
        data["text_encoder_lr"] = 0
    elif data.get("text_encoder_lr") in (None, "") and common is not None:
        data["text_encoder_lr"] = common
    if text_only:
        data["unet_lr"] = 0
    if data.get("lr_warmup_steps") in OFF and "lr_warmup" in data:
        data["lr_warmup_steps"] = float(data["lr_warmup"]) / 100
    data.pop("lr_warmup", None)
    if int(float(data.get("max_train_steps") or 0)):
        data.pop("epoch", None)
        data.pop("max_train_epochs", None)
    else:
        data.pop("max_train_steps", None)
    return _translate("kohya", data, KOHYA, KOHYA_QUIET, KOHYA_DEFAULTS)


FROM_METADATA = {
    "ss_network_dim": "network_dim", "ss_network_alpha": "network_alpha", "ss_learning_rate": "learning_rate", "ss_unet_lr": "unet_lr",
    "ss_text_encoder_lr": "text_encoder_lr", "ss_lr_scheduler": "lr_scheduler", "ss_seed": "seed", "ss_resolution": "resolution",
    "ss_min_snr_gamma": "min_snr_gamma", "ss_noise_offset": "noise_offset", "ss_steps": "max_train_steps", "ss_output_name": "output_name",
    "ss_batch_size_per_device": "train_batch_size", "ss_gradient_accumulation_steps": "gradient_accumulation_steps",
    "ss_gradient_checkpointing": "gradient_checkpointing", "ss_clip_skip": "clip_skip", "ss_max_token_length": "max_token_length",
    "ss_caption_dropout_rate": "caption_dropout_rate", "ss_network_dropout": "network_dropout",
}  # fmt: skip


def _from_metadata(data: Mapping[str, Any]) -> Foreign:
    """What sd-scripts writes into a finished file, all of it as texts."""
    words = {"None": None, "True": True, "False": False}
    known = {FROM_METADATA[key]: words.get(value, value) for key, value in data.items() if key in FROM_METADATA and isinstance(value, str)}
    optimizer = str(data.get("ss_optimizer") or "").partition("(")[0].rpartition(".")[2]
    found = _kohya(known | ({"optimizer": optimizer} if optimizer else {}))
    trigger = data.get("modelspec.trigger_phrase")
    return Foreign("the metadata of the adapter", found.changes | ({"dataset.trigger": trigger} if trigger else {}), found.left_out)


def _from_picture(text: str) -> Foreign:
    """A1111's text in a picture: prompt, negative prompt, and a last line of settings."""
    written, _, settings = text.rpartition("Steps: ")
    prompt, _, negative = written.partition("Negative prompt: ")
    facts = dict(part.split(": ", 1) for part in f"Steps: {settings}".split(", ") if ": " in part)
    rules = {"Steps": _number("sampling.inference_steps", int), "CFG scale": _number("sampling.guidance_scale"),
             "Seed": _number("sampling.seed", int), "Sampler": "sampling.sampler"}  # fmt: skip
    found = _translate("the picture", facts, rules, re.compile(".*"), {})
    texts = {"sampling.prompts": [prompt.strip()][: bool(prompt.strip())], "sampling.negative_prompt": negative.strip()}
    return Foreign(found.program, texts | found.changes, found.left_out)


def _kohya_rate(value: Any) -> dict[str, Any]:
    return {"training.text_encoder_learning_rate": float(value[0] if isinstance(value, list) else value)}


def _kohya_network(value: str) -> dict[str, Any]:
    kinds = {"networks.lora": "lora", "standard": "lora", "kohya locon": "lora", "lycoris/locon": "lora", "lycoris/loha": "loha",
             "lycoris/lokr": "lokr"}  # fmt: skip
    kind = kinds[value.lower()]
    return {} if kind == "lora" else {"adapter.kind": kind}


def _kohya_arguments(value: Any) -> dict[str, Any]:
    """ "weight_decay=0.1 betas=0.9,0.99", as one text or a list."""
    words = value.split() if isinstance(value, str) else list(value)
    pairs = dict(word.split("=", 1) for word in words)
    decay = pairs.pop("weight_decay", None)
    changes: dict[str, Any] = {} if decay is None else {"training.weight_decay": float(decay)}
    arguments = [f"{key}=({text})" if "," in text and not text.startswith("(") else f"{key}={text}" for key, text in pairs.items()]
    return changes | ({"training.optimizer_args": arguments} if arguments else {})


def _kohya_views(value: Any) -> dict[str, Any]:
    """An epoch shows each picture once (times the repeats of its folder), which is one view."""
    return {"training.views_per_picture": int(float(value))}


def _v_prediction(value: Any) -> dict[str, Any]:
    return {"base.prediction": "v"} if value else {}


KOHYA: dict[str, Rule] = {
    "pretrained_model_name_or_path": "base.model",
    "vae": "base.vae",
    "v_parameterization": _v_prediction,
    "clip_skip": _number("base.clip_skip", int),
    "max_token_length": _number("dataset.caption_tokens", int),
    "zero_terminal_snr": lambda value: {"base.zero_terminal_snr": "on"} if value else {},
    "mixed_precision": _precision("base.precision"),
    "save_precision": _precision("saving.precision"),
    "output_name": _name,
    "train_data_dir": "dataset.folder",
    "resolution": _resolution,
    "max_resolution": _resolution,
    "bucket_reso_steps": _number("dataset.bucket_step", int),
    "bucket_no_upscale": lambda value: {"dataset.allow_upscale": not value},
    "caption_dropout_rate": _number("dataset.caption_dropout"),
    "LoRA_type": _kohya_network,
    "network_module": _kohya_network,
    "network_dim": _number("adapter.rank", int),
    "network_alpha": _number("adapter.alpha"),
    "network_dropout": _number("adapter.dropout"),
    "rank_dropout": _number("adapter.rank_dropout"),
    "module_dropout": _number("adapter.module_dropout"),
    "unet_lr": _number("training.learning_rate"),
    "text_encoder_lr": _kohya_rate,
    "lr_scheduler": _schedule,
    "lr_scheduler_num_cycles": _number("training.lr_cycles", int),
    "lr_scheduler_power": _number("training.lr_power"),
    "lr_warmup_steps": _number("training.warmup"),
    "optimizer": _optimizer,
    "optimizer_type": _optimizer,
    "optimizer_args": _kohya_arguments,
    "max_train_steps": _number("training.steps", int),
    "max_train_epochs": _kohya_views,
    "epoch": _kohya_views,
    "train_batch_size": _number("training.batch_size", int),
    "gradient_accumulation_steps": _number("training.gradient_accumulation_steps", int),
    "gradient_checkpointing": "training.gradient_checkpointing",
    "max_grad_norm": _number("training.max_grad_norm"),
    "seed": _number("training.seed", int),
    "min_snr_gamma": _number("objective.min_snr_gamma"),
    "noise_offset": _number("objective.noise_offset"),
    "sample_prompts": _prompts,
}
KOHYA_QUIET = re.compile(
    r"additional_parameters|async_upload|bucket_\w+|cache_\w+|caption_extension|caption_metadata\w*|console_\w+|debug\w*|dynamo_\w+|enable_bucket|"
    r"extra_accelerate\w*|full_\w+|gpu_ids|huggingface_\w*|log_\w+|logging_dir|lowram|main_process_port|max_bucket_reso|max_data_loader\w*|"
    r"mem_eff_attn|metadata_\w+|min_bucket_reso|model_list|multi_gpu|no_half_vae|num_\w+|output_dir|persistent\w*|resume\w*|sample_every\w*|"
    r"sample_sampler|save_(as|every|last|model|state)\w*|sdxl\w*|sdpa|training_comment|use_wandb|v2|wandb\w*|xformers|LyCORIS_preset|dataset_config"
)
KOHYA_DEFAULTS = {
    "loss_type": "l2",
    "prior_loss_weight": 1,
    "max_timestep": 1000,
    "noise_offset_type": "Original",
    "huber_schedule": "snr",
    "huber_c": 0.1,
    "huber_scale": 1,
    "factor": -1,
    "unit": 1,
    "conv_dim": 1,
    "conv_alpha": 1,
    "multires_noise_discount": 0.3,
    "ip_noise_gamma": 0,
    "block_lr_zero_threshold": "",
}

# -- OneTrainer --


def _one_rate_of_text(value: Any) -> dict[str, Any]:
    return {"training.text_encoder_learning_rate": float(value)}


def _one_loss_weight(value: str) -> dict[str, Any]:
    return {"CONSTANT": {"objective.min_snr_gamma": 0.0}, "MIN_SNR_GAMMA": {}}[value]


def _one_schedule(value: str) -> dict[str, Any]:
    return _schedule(value)


ONE_TRAINER: dict[str, Rule] = {
    "base_model_name": "base.model",
    "train_dtype": _precision("base.precision"),
    "output_dtype": _precision("saving.precision"),
    "output_model_destination": _name,
    "resolution": _resolution,
    "peft_type": lambda value: {"LORA": {}, "LOHA": {"adapter.kind": "loha"}}[value],
    "lora_decompose": lambda value: {"adapter.kind": "dora"} if value else {},
    "lora_rank": _number("adapter.rank", int),
    "lora_alpha": _number("adapter.alpha"),
    "dropout_probability": _number("adapter.dropout"),
    "learning_rate": _number("training.learning_rate"),
    "unet.learning_rate": _number("training.learning_rate"),
    "text_encoder.learning_rate": _one_rate_of_text,
    "text_encoder.train": lambda value: {} if value else {"training.text_encoder_learning_rate": 0.0},
    "learning_rate_scheduler": _one_schedule,
    "learning_rate_warmup_steps": _number("training.warmup"),
    "learning_rate_cycles": _number("training.lr_cycles", int),
    "optimizer.optimizer": _optimizer,
    "optimizer.weight_decay": _number("training.weight_decay"),
    "epochs": _kohya_views,
    "batch_size": _number("training.batch_size", int),
    "gradient_accumulation_steps": _number("training.gradient_accumulation_steps", int),
    "gradient_checkpointing": lambda value: {"training.gradient_checkpointing": value not in ("OFF", False)},
    "clip_grad_norm": _number("training.max_grad_norm"),
    "seed": _number("training.seed", int),
    "loss_weight_fn": _one_loss_weight,
    "loss_weight_strength": _number("objective.min_snr_gamma"),
    "offset_noise_weight": _number("objective.noise_offset"),
    "ema": lambda value: {} if value == "OFF" else {"training.ema_decay": 0.999},
    "ema_decay": _number("training.ema_decay"),
    "text_encoder_layer_skip": lambda value: {"base.clip_skip": int(value) + 1},
}
ONE_TRAINER_QUIET = re.compile(
    r"__version|training_method|model_type|workspace_dir|cache_dir|debug\w*|tensorboard\w*|validation\w*|concept\w*|sample\w*|backup\w*|save_\w+|"
    r"output_model_format|rolling\w*|dataloader_threads|train_device|temp_device|latent_caching|clear_cache\w*|aspect_ratio_bucketing|"
    r"include_train_config|.*weight_dtype|fallback_train_dtype|unet\..*|text_encoder(_\d)?\..*|prior\..*|vae\..*|optimizer\..*|enable_\w+|"
    r"only_cache|secrets.*|attention_mechanism|cloud\..*|.*_filename|.*offload.*|compile|frames|embedding\..*|non_blocking|gradient_\w+"
)
ONE_TRAINER_DEFAULTS = {
    "learning_rate_scaler": "NONE",
    "learning_rate_min_factor": 0.0,
    "mse_strength": 1.0,
    "timestep_distribution": "UNIFORM",
    "max_noising_strength": 1.0,
    "ema": "OFF",
    "ema_update_step_interval": 5,
    "loss_scaler": "NONE",
    "lora_layer_preset": "full",
    "unmasked_probability": 0.1,
    "unmasked_weight": 0.1,
}

# -- ai-toolkit --


def _ai_toolkit(data: Mapping[str, Any]) -> Foreign:
    """The first process of a job and its first dataset; the rest is named."""
    process = data["process"][0] if isinstance(data["process"][0], dict) else {}
    flat = _flatten({key: value for key, value in process.items() if key != "datasets"})
    datasets = [part for part in process.get("datasets") or [] if isinstance(part, dict)]
    flat |= _flatten(datasets[0], "datasets.") if datasets else {}
    flat["name"] = data.get("name")
    if flat.pop("train.train_unet", True) is False:
        flat["train.lr"], flat["text_lr"] = 0, flat.get("train.lr")
    elif flat.pop("train.train_text_encoder", False):
        flat["text_lr"] = flat.get("train.lr")
    else:
        flat["text_lr"] = 0
    flat.pop("train.train_text_encoder", None)
    if not flat.pop("train.ema_config.use_ema", False):
        flat.pop("train.ema_config.ema_decay", None)
    if "network.conv" in flat:
        flat["adapter_targets"] = "linear+conv"
    found = _translate("ai-toolkit", flat, AI_TOOLKIT, AI_TOOLKIT_QUIET, AI_TOOLKIT_DEFAULTS)
    more = [f"{len(part) - 1} more {what}" for part, what in ((data["process"], "processes"), (datasets, "datasets")) if len(part) > 1]
    return Foreign(found.program, found.changes, [*found.left_out, *more])


def _ai_resolution(value: Any) -> dict[str, Any]:
    """Of several it takes the largest that was asked for."""
    return _resolution(max(value) if isinstance(value, list) else value)


def _ai_base(value: str) -> dict[str, Any]:
    return {"base.model": value}


AI_TOOLKIT: dict[str, Rule] = {
    "name": _name,
    "trigger_word": "dataset.trigger",
    "model.name_or_path": _ai_base,
    "train.dtype": _precision("base.precision"),
    "save.dtype": _precision("saving.precision"),
    "datasets.folder_path": "dataset.folder",
    "datasets.caption_dropout_rate": _number("dataset.caption_dropout"),
    "datasets.resolution": _ai_resolution,
    "network.type": lambda value: {"lora": {}, "lokr": {"adapter.kind": "lokr"}, "dora": {"adapter.kind": "dora"}}[value],
    "network.linear": _number("adapter.rank", int),
    "network.linear_alpha": _number("adapter.alpha"),
    "network.conv": _number("adapter.conv_rank", int),
    "network.conv_alpha": _number("adapter.conv_alpha"),
    "adapter_targets": "adapter.targets",
    "train.lr": _number("training.learning_rate"),
    "text_lr": _number("training.text_encoder_learning_rate"),
    "train.steps": _number("training.steps", int),
    "train.batch_size": _number("training.batch_size", int),
    "train.gradient_accumulation_steps": _number("training.gradient_accumulation_steps", int),
    "train.gradient_accumulation": _number("training.gradient_accumulation_steps", int),
    "train.gradient_checkpointing": "training.gradient_checkpointing",
    "train.optimizer": _optimizer,
    "train.optimizer_params.weight_decay": _number("training.weight_decay"),
    "train.lr_scheduler": _schedule,
    "train.max_grad_norm": _number("training.max_grad_norm"),
    "train.min_snr_gamma": _number("objective.min_snr_gamma"),
    "train.noise_offset": _number("objective.noise_offset"),
    "train.ema_config.ema_decay": _number("training.ema_decay"),
    "sample.prompts": _prompts,
    "sample.samples": _prompts,
    "sample.neg": "sampling.negative_prompt",
    "sample.seed": _number("sampling.seed", int),
    "sample.guidance_scale": _number("sampling.guidance_scale"),
    "sample.sample_steps": _number("sampling.inference_steps", int),
}
AI_TOOLKIT_QUIET = re.compile(
    r"type|training_folder|device|performance_log_every|sqlite_db_path|logging\..*|save\..*|meta.*|sample\.(sampler|sample_every|width|height|walk_seed)|"
    r"datasets\.(caption_ext|cache_\w+|num_workers)|train\.(noise_scheduler|cache_\w+|unload_\w+|skip_first_sample|disable_sampling|loss_type)|"
    r"model\.(arch|is_\w+|low_vram)"
)
AI_TOOLKIT_DEFAULTS = {"train.content_or_style": "balanced", "train.timestep_type": "sigmoid"}

"""Settings of other trainers as changes to a `RunConfig`: kohya_ss and sd-scripts (JSON, TOML), OneTrainer (JSON), ai-toolkit (YAML).

Each trainer is a table of its names. Settings that mean something only together (an average's switch and its decay, a common rate and
those that take its place) are settled by the rules of that program before the table is read. What has no counterpart here is listed,
never dropped without a word; what only says how that program works (caches, folders, its window) is left out quietly.
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
OFF: tuple[Any, ...] = (None, "", 0, False, "none", "None", "NONE", "OFF", "False", [], {})

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
    if (
        isinstance(data.get("config"), dict)
        and isinstance(data["config"].get("process"), list)
        and data["config"]["process"]
    ):
        return _ai_toolkit(data["config"])
    if "training_method" in data or "base_model_name" in data or "lora_rank" in data:
        return _one_trainer(_flatten(data))
    if "ss_network_dim" in data:
        return _from_metadata(data)
    if isinstance(data.get("parameters"), str):
        return _from_picture(data["parameters"])
    flat = _without_sections(data)
    if (
        KOHYA.keys()
        & flat.keys()
        & {
            "network_dim",
            "network_module",
            "pretrained_model_name_or_path",
            "max_train_steps",
            "network_alpha",
        }
    ):
        return _kohya(flat)
    raise ConfigError(
        "These are settings of no trainer that is known here: kohya_ss, sd-scripts, OneTrainer and ai-toolkit are."
    )


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
            fault = rf"\n- {re.escape(path)}[:.].*\(got "  # of the value itself, no contradiction, which other changes may solve
            if re.search(fault, str(error)) or path not in known:
                left_out.append(f"{path} = {value}")
                continue
        changes[path] = value
    try:
        return config.replace(run, changes), left_out
    except ConfigError as error:
        raise ConfigError(
            f"The settings from {foreign.program} do not fit together. {error}"
        ) from None


class _PlainYaml(yaml.SafeLoader):
    """Without aliases: nine of nine of nine of them make some hundred bytes fill the memory."""

    def compose_node(self, *place: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ConfigError(
                "The file repeats parts of itself by YAML aliases (*name), which are not read; write them out."
            )
        return super().compose_node(*place)


def _parse(text: str) -> dict[str, Any]:
    for reader in (json.loads, tomllib.loads, lambda text: yaml.load(text, _PlainYaml)):
        try:
            data = reader(text)
        except (ValueError, yaml.YAMLError, RecursionError):
            continue
        if isinstance(data, dict):
            return data
    raise ConfigError("The file is neither JSON nor TOML nor YAML.")


def _translate(
    program: str,
    data: Mapping[str, Any],
    rules: Mapping[str, Rule],
    quiet: re.Pattern,
    defaults: Mapping[str, Any],
) -> Foreign:
    changes: dict[str, Any] = {}
    left_out: list[str] = []
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
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError):
            left_out.append(_shown(name, value))
    return Foreign(program, changes, left_out)


def _shown(name: str, value: Any) -> str:
    return f"{name} = {str(value).strip()[:80]}"


def _without_sections(data: Mapping[str, Any]) -> dict[str, Any]:
    """sd-scripts ignores the sections of its TOML."""
    return {
        str(name): value
        for key, part in data.items()
        for name, value in (part.items() if isinstance(part, dict) else [(key, part)])
    }


def _given(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if value is not None and value != ""}


def _amount(data: Mapping[str, Any], name: str) -> float:
    """A number that other settings hang on; 0 where it is not given."""
    try:
        return float(data.get(name) or 0)
    except (ValueError, TypeError, OverflowError):
        raise ConfigError(f"{_shown(name, data[name])} is no number.") from None


def _flatten(data: Mapping[str, Any], front: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= (
            _flatten(value, f"{front}{key}.")
            if isinstance(value, dict)
            else {f"{front}{key}": value}
        )
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


OUTER_LAYERS = "training of the layers outside the blocks, such as conv_in and time_embedding"


def _layers(targets: str = "attention", pattern: str = "") -> dict[str, Any]:
    """All of these programs train every linear layer of a text encoder's blocks."""
    return {
        "adapter.targets": targets,
        "adapter.target_pattern": pattern,
        "adapter.text_encoder_targets": "all",
    }


def _side(value: Any) -> int:
    """Of the square with as many pixels: 624 for "512,768"."""
    sides = [int(side) for side in re.findall(r"\d+", str(value))]
    return round((sides[0] * sides[-1]) ** 0.5 / 8) * 8


def _resolution(value: Any) -> dict[str, Any]:
    return {"dataset.resolution": _side(value)}


def _resolutions(value: Any) -> dict[str, Any]:
    """Several, as a list or with commas, are trained side by side; the largest is the main one."""
    parts = value if isinstance(value, list) else str(value).split(",")
    largest, *others = sorted({_side(part) for part in parts}, reverse=True)
    return {"dataset.resolution": largest, "dataset.resolutions": others}


def _prompts(value: Any) -> dict[str, Any]:
    """sd-scripts writes options behind a prompt ("--n ugly --w 512"); only the text is taken."""
    lines = (
        value.splitlines()
        if isinstance(value, str)
        else [line["prompt"] if isinstance(line, dict) else line for line in value]
    )
    texts = [re.split(r"\s--\w", line)[0].strip() for line in lines]
    if any(text.endswith((".txt", ".toml", ".json")) for text in texts):
        raise ValueError("a file of prompts")
    return {"sampling.prompts": [text for text in texts if text and not text.startswith("#")][:16]}


# -- kohya_ss and sd-scripts --


# What sd-scripts takes where nothing is said.
KOHYA_ABSENT = {"network_alpha": 1, "lr_scheduler": "constant", "min_snr_gamma": 0, "noise_offset": 0, "ip_noise_gamma": 0,
                "scale_weight_norms": 0, "network_dropout": 0, "loss_type": "l2"}  # fmt: skip
KOHYA_LENGTHS = ("max_train_epochs", "max_train_steps", "epoch")  # the first above 0 counts


def _kohya(data: Mapping[str, Any]) -> Foreign:
    data = KOHYA_ABSENT | _given(data)
    settled = _kohya_layers(data) | {
        "objective.weighting": "debiased"
        if data.pop("debiased_estimation_loss", False)
        else "min_snr"
    }
    _settle_kohya_rates(data)
    _settle_kohya_noise(data)
    lengths = [name for name in KOHYA_LENGTHS if _amount(data, name) > 0]
    data = {
        name: value
        for name, value in data.items()
        if name not in KOHYA_LENGTHS or name in lengths[:1]
    }
    share = _amount(data, "lr_warmup") / 100
    data.pop("lr_warmup", None)
    if data["lr_scheduler"] == "constant":  # has no warm-up there, only constant_with_warmup has
        data["lr_warmup_steps"] = 0
    elif not _amount(data, "lr_warmup_steps"):
        data["lr_warmup_steps"] = share
    if data.get("shuffle_caption") or _amount(data, "caption_tag_dropout_rate"):
        data.setdefault("keep_tokens", 0)
    found = _translate("kohya", data, KOHYA, KOHYA_QUIET, KOHYA_DEFAULTS)
    return Foreign(found.program, settled | found.changes, found.left_out)


def _kohya_layers(data: dict[str, Any]) -> dict[str, Any]:
    """The kind and the layers of a network. sd-scripts trains what is in a Transformer2DModel, with a conv_dim what is in a ResnetBlock2D
    and the samplers too; LyCORIS trains all of these where its preset does not say otherwise."""
    arguments = data.pop("network_args", {})
    arguments = arguments if isinstance(arguments, dict) else _kohya_pairs(arguments)
    form, module = data.pop("LoRA_type", None), data.pop("network_module", "networks.lora")
    name = str(form or module).lower()
    lycoris = name.startswith("lycoris")
    if not lycoris and name != "kohya locon":  # the form keeps the numbers of every type
        data.pop("conv_dim", None)
        data.pop("conv_alpha", None)
    data |= {
        NETWORK_ARGUMENTS.get(key, f"network_args.{key}"): value for key, value in arguments.items()
    }
    algorithm = str(data.pop("algo", None) or re.split(r"[./]", name)[-1]).lower()
    kind = NETWORKS.get(algorithm)
    if kind is None:
        data["LoRA_type" if form else "network_module"] = f"{form or module} ({algorithm})"
        return {}
    if kind == "lora" and str(data.get("dora_wd")).lower() == "true":
        kind = "dora"
        del data["dora_wd"]
    if kind != "lokr":
        data.pop("factor", None)
    convolutions = _amount(data, "conv_dim") > 0 if "conv_dim" in data else lycoris
    if not convolutions:
        data.pop("conv_alpha", None)
    elif "conv_dim" in data:
        data.setdefault("conv_alpha", data["network_alpha"] if lycoris else 1)
    blocks_alone = data.get("LyCORIS_preset") == "attn-mlp" if lycoris else not convolutions
    if data.get("LyCORIS_preset") in ("full", "attn-mlp"):
        del data["LyCORIS_preset"]
    layers = (
        _layers(pattern=TRANSFORMERS)
        if blocks_alone
        else _layers("linear+conv" if convolutions else "linear")
    )
    return {"adapter.kind": kind} | layers


def _settle_kohya_rates(data: dict[str, Any]) -> None:
    """A common rate and two that take its place; 0 leaves a part as it is. The form writes 0 into both where the common one is meant."""
    common = data.pop("learning_rate", None)
    if data.get("unet_lr") == data.get("text_encoder_lr") == 0:
        del data["unet_lr"], data["text_encoder_lr"]
    if common is not None:
        data |= {name: data.get(name, common) for name in ("unet_lr", "text_encoder_lr")}
    if data.pop("network_train_unet_only", False):
        data["text_encoder_lr"] = 0
    if data.pop("network_train_text_encoder_only", False):
        data["unet_lr"] = 0


def _settle_kohya_noise(data: dict[str, Any]) -> None:
    """The form keeps the numbers of both kinds of noise beside the one that is chosen."""
    chosen = data.pop("noise_offset_type", None)
    if chosen == "Original":
        data.pop("multires_noise_iterations", None)
    elif chosen == "Multires":
        data["noise_offset"] = 0
    if not _amount(data, "multires_noise_iterations"):
        data["multires_noise_discount"] = 0
    data.pop("multires_noise_iterations", None)  # here as many as the picture has room for
    if not _amount(data, "noise_offset"):
        data.pop("noise_offset_random_strength", None)


FROM_METADATA = {"ss_steps": "max_train_steps", "ss_batch_size_per_device": "train_batch_size",
                 "ss_debiased_estimation": "debiased_estimation_loss"} | {f"ss_{name}": name for name in (
    "network_dim", "network_alpha", "network_module", "network_dropout", "learning_rate", "unet_lr", "text_encoder_lr", "lr_scheduler",
    "lr_warmup_steps", "seed", "resolution", "min_snr_gamma", "noise_offset", "noise_offset_random_strength", "ip_noise_gamma",
    "multires_noise_iterations", "multires_noise_discount", "zero_terminal_snr", "loss_type", "huber_schedule", "huber_c", "output_name",
    "gradient_accumulation_steps", "gradient_checkpointing", "mixed_precision", "max_grad_norm", "scale_weight_norms", "clip_skip",
    "max_token_length", "caption_dropout_rate", "caption_tag_dropout_rate", "shuffle_caption", "keep_tokens", "flip_aug", "random_crop",
    "prior_loss_weight",
)}  # fmt: skip


def _from_metadata(data: Mapping[str, Any]) -> Foreign:
    """What sd-scripts writes into a finished file, all of it as texts."""
    words = {"None": None, "True": True, "False": False}
    known: dict[str, Any] = {
        FROM_METADATA[key]: words.get(value, value)
        for key, value in data.items()
        if key in FROM_METADATA and isinstance(value, str)
    }
    try:
        known["network_args"] = json.loads(data.get("ss_network_args") or "{}")
    except (ValueError, TypeError, RecursionError):
        raise ConfigError(
            f"{_shown('ss_network_args', data['ss_network_args'])} is no table of arguments."
        ) from None
    optimizer, _, arguments = str(data.get("ss_optimizer") or "").partition("(")
    if optimizer:
        known["optimizer"] = optimizer.rpartition(".")[2]
        known["optimizer_args"] = re.findall(r"\w+=(?:\([^()]*\)|\[[^\[\]]*\]|[^,()]+)", arguments)
    found = _kohya(known)
    trigger = data.get("modelspec.trigger_phrase")
    return Foreign(
        "the metadata of the adapter",
        found.changes | ({"dataset.trigger": trigger} if trigger else {}),
        found.left_out,
    )


def _from_picture(text: str) -> Foreign:
    """A1111's text in a picture: prompt, negative prompt, and a last line of settings."""
    written, _, settings = text.rpartition("Steps: ")
    prompt, _, negative = written.partition("Negative prompt: ")
    facts = dict(part.split(": ", 1) for part in f"Steps: {settings}".split(", ") if ": " in part)
    rules = {"Steps": _number("sampling.inference_steps", int), "CFG scale": _number("sampling.guidance_scale"),
             "Seed": _number("sampling.seed", int), "Sampler": "sampling.sampler"}  # fmt: skip
    found = _translate("the picture", facts, rules, re.compile(".*"), {})
    texts = {
        "sampling.prompts": [prompt.strip()][: bool(prompt.strip())],
        "sampling.negative_prompt": negative.strip(),
    }
    return Foreign(found.program, texts | found.changes, found.left_out)


TRANSFORMERS = r"attentions\."  # what diffusers calls each Transformer2DModel of a UNet
NETWORKS = {
    "lora": "lora",
    "standard": "lora",
    "kohya locon": "lora",
    "locon": "lora",
    "kohya": "lora",
    "loha": "loha",
    "lokr": "lokr",
}
NETWORK_ARGUMENTS = {"dropout": "network_dropout", "preset": "LyCORIS_preset"} | {
    name: name
    for name in (
        "algo",
        "conv_dim",
        "conv_alpha",
        "rank_dropout",
        "module_dropout",
        "dora_wd",
        "factor",
    )
}


def _rates(value: Any) -> list[float]:
    """A list of text encoders, or the text of one."""
    return [float(text) for text in re.findall(r"[^\s,\[\]'\"]+", str(value))]


def _kohya_rate(value: Any) -> dict[str, Any]:
    first, *others = _rates(value)
    return {
        "training.text_encoder_learning_rate": first,
        "training.text_encoder_2_learning_rate": (*others, -1.0)[0],
    }


def _kohya_pairs(value: Any) -> dict[str, str]:
    """ "weight_decay=0.1 betas=0.9,0.99", as one text or a list."""
    words = value.split() if isinstance(value, str) else value if isinstance(value, list) else []
    return {
        name.strip(): text.strip() for name, _, text in (str(word).partition("=") for word in words)
    }


def _kohya_arguments(value: Any) -> dict[str, Any]:
    pairs = _kohya_pairs(value)
    decay = pairs.pop("weight_decay", None)
    changes: dict[str, Any] = {} if decay is None else {"training.weight_decay": float(decay)}
    arguments = [
        f"{key}=({text})" if "," in text and not text.startswith(("(", "[")) else f"{key}={text}"
        for key, text in pairs.items()
    ]
    return changes | ({"training.optimizer_args": arguments} if arguments else {})


def _kohya_views(value: Any) -> dict[str, Any]:
    """An epoch shows each picture once (times the repeats of its folder), which is one view."""
    return {"training.views_per_picture": int(float(value)), "training.steps": 0}


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
    "caption_tag_dropout_rate": _number("dataset.tag_dropout"),
    "shuffle_caption": "dataset.shuffle_tags",
    "keep_tokens": _number("dataset.keep_tags", int),
    "enable_wildcard": "dataset.caption_wildcards",
    "flip_aug": "dataset.flip",
    "random_crop": "dataset.random_crop",
    "masked_loss": lambda value: {"dataset.masked_loss": "mask"} if value else {},
    "alpha_mask": lambda value: {"dataset.masked_loss": "alpha"} if value else {},
    "reg_data_dir": "dataset.regularisation_folder",
    "prior_loss_weight": _number("dataset.prior_loss_weight"),
    "network_dim": _number("adapter.rank", int),
    "network_alpha": _number("adapter.alpha"),
    "network_dropout": _number("adapter.dropout"),
    "conv_dim": _number("adapter.conv_rank", int),
    "conv_alpha": _number("adapter.conv_alpha"),
    "factor": lambda value: {"adapter.lokr_factor": max(0, int(value))},
    "scale_weight_norms": _number("adapter.max_norm"),
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
    "noise_offset_random_strength": "objective.noise_offset_random",
    "multires_noise_discount": _number("objective.pyramid_noise"),
    "ip_noise_gamma": _number("objective.input_perturbation"),
    "loss_type": "objective.loss",
    "huber_c": _number("objective.huber_c"),
    "huber_schedule": "objective.huber_schedule",
    "min_timestep": _number("objective.min_timestep", int),
    "max_timestep": _number("objective.max_timestep", int),
    "sample_prompts": _prompts,
}
KOHYA_QUIET = re.compile(
    r"additional_parameters|async_upload|bucket_\w+|cache_\w+|caption_extension|caption_metadata\w*|console_\w+|debug\w*|dynamo_\w+|enable_bucket|"
    r"extra_accelerate\w*|full_\w+|gpu_ids|huggingface_\w*|log_\w+|logging_dir|lowram|main_process_port|max_bucket_reso|max_data_loader\w*|"
    r"mem_eff_attn|metadata_\w+|min_bucket_reso|model_list|multi_gpu|no_half_vae|num_\w+|output_dir|persistent\w*|resume\w*|sample_every\w*|"
    r"sample_sampler|save_(as|every|last|model|state)\w*|sdxl\w*|sdpa|training_comment|use_wandb|v2|wandb\w*|xformers"
)
KOHYA_DEFAULTS = {"huber_scale": 1, "unit": 1}

# -- OneTrainer --


def _one_trainer(data: Mapping[str, Any]) -> Foreign:
    """It saves every field, those too that a switch beside them turns off."""
    data = _given(data)
    model = str(data.get("model_type"))
    denoiser = "transformer" if model.startswith("STABLE_DIFFUSION_3") else "unet"
    parts = {"unet_rate": denoiser, "text_rate": "text_encoder"}
    if denoiser == "transformer" or "XL" in model:
        parts["text_rate_2"] = "text_encoder_2"
    common = data.pop("learning_rate", None)
    for name, part in parts.items():
        data[name] = (
            data.get(f"{part}.learning_rate", common) if data.get(f"{part}.train", True) else 0
        )
    _settle_one_end(data)
    data.setdefault("gradient_checkpointing", data.get(f"{denoiser}.gradient_checkpointing"))
    if data.pop("ema", "OFF") == "OFF":
        data["ema_decay"] = 0
    data[f"loss_weight.{data.pop('loss_weight_fn', 'CONSTANT')}"] = data.pop(
        "loss_weight_strength", 5.0
    )
    if not data.get("masked_training"):
        data.pop("unmasked_weight", None)
    kind = data.setdefault("peft_type", "LORA")
    if data.pop("lora_decompose", False) and kind == "LORA":
        data["peft_type"] = "DORA"
    if kind == "LOKR":
        data["lora_rank"] = data.pop("lokr_dim", 16)
    unused = ("oft_", "dora_oft") if kind == "LOKR" else ("oft_", "dora_oft", "lokr_")
    words = [
        word.strip()
        for word in str(data.pop("layer_filter", data.pop("lora_layers", ""))).split(",")
        if word.strip()
    ]
    written = data.pop("layer_filter_regex", data.pop("lora_layers_regex", False))
    layers = (
        _layers(pattern="|".join(word if written else re.escape(word) for word in words))
        if words
        else _layers("linear+conv")
    )
    data = {name: value for name, value in _given(data).items() if not name.startswith(unused)}
    found = _translate("OneTrainer", data, ONE_TRAINER, ONE_TRAINER_QUIET, ONE_TRAINER_DEFAULTS)
    return Foreign(
        found.program, layers | found.changes, found.left_out + ([] if words else [OUTER_LAYERS])
    )


def _settle_one_end(data: dict[str, Any]) -> None:
    """The text encoders end after a number of epochs, here after a share of the run."""
    end, epochs = _amount(data, "text_encoder.stop_training_after"), _amount(data, "epochs")
    unit = data.get("text_encoder.stop_training_after_unit", "EPOCH")
    data["text_until"] = 1
    if end and unit != "NEVER" and _amount(data, "text_rate"):
        if unit == "EPOCH" and epochs and _amount(data, "unet_rate"):
            data["text_until"] = min(1.0, end / epochs)
        else:
            data["stop_training_after"] = f"{end:g} {unit}"


def _share_of_time(path: str) -> Rule:
    return lambda value: {path: round(1000 * float(value))}


ONE_TRAINER: dict[str, Rule] = {
    "base_model_name": "base.model",
    "train_dtype": _precision("base.precision"),
    "output_dtype": _precision("saving.precision"),
    "output_model_destination": _name,
    "vae.model_name": "base.vae",
    "force_v_prediction": _v_prediction,
    "rescale_noise_scheduler_to_zero_terminal_snr": lambda value: (
        {"base.zero_terminal_snr": "on"} if value else {}
    ),
    "resolution": _resolutions,
    "masked_training": lambda value: {"dataset.masked_loss": "mask" if value else "off"},
    "unmasked_weight": _number("dataset.mask_outside"),
    "peft_type": lambda value: {
        "adapter.kind": {"LORA": "lora", "DORA": "dora", "LOHA": "loha", "LOKR": "lokr"}[value]
    },
    "lokr_decompose_factor": lambda value: {"adapter.lokr_factor": max(0, int(value))},
    "lora_rank": _number("adapter.rank", int),
    "lora_alpha": _number("adapter.alpha"),
    "dropout_probability": _number("adapter.dropout"),
    "unet_rate": _number("training.learning_rate"),
    "text_rate": _number("training.text_encoder_learning_rate"),
    "text_rate_2": _number("training.text_encoder_2_learning_rate"),
    "text_until": _number("training.text_encoder_until"),
    "learning_rate_scheduler": _schedule,
    "learning_rate_warmup_steps": _number("training.warmup"),
    "learning_rate_cycles": _number("training.lr_cycles", int),
    "optimizer.optimizer": _optimizer,
    "optimizer.weight_decay": _number("training.weight_decay"),
    "epochs": _kohya_views,
    "batch_size": _number("training.batch_size", int),
    "gradient_accumulation_steps": _number("training.gradient_accumulation_steps", int),
    "gradient_checkpointing": lambda value: {
        "training.gradient_checkpointing": value not in ("OFF", False)
    },
    "clip_grad_norm": _number("training.max_grad_norm"),
    "seed": _number("training.seed", int),
    "loss_weight.CONSTANT": lambda _: {
        "objective.weighting": "min_snr",
        "objective.min_snr_gamma": 0.0,
    },
    "loss_weight.MIN_SNR_GAMMA": lambda strength: {
        "objective.weighting": "min_snr",
        "objective.min_snr_gamma": float(strength),
    },
    "loss_weight.DEBIASED_ESTIMATION": lambda _: {"objective.weighting": "debiased"},
    "loss_weight.P2": lambda strength: {
        "objective.weighting": "p2",
        "objective.p2_gamma": float(strength),
    },
    "min_noising_strength": _share_of_time("objective.min_timestep"),
    "max_noising_strength": _share_of_time("objective.max_timestep"),
    "offset_noise_weight": _number("objective.noise_offset"),
    "perturbation_noise_weight": _number("objective.input_perturbation"),
    "ema_decay": _number("training.ema_decay"),
    "text_encoder_layer_skip": lambda value: {"base.clip_skip": int(value) + 1},
}
ONE_TRAINER_QUIET = re.compile(
    r"__version|training_method|model_type|workspace_dir|cache_dir|debug\w*|tensorboard\w*|validation\w*|concept\w*|sample\w*|backup\w*|save_\w+|"
    r"output_model_format|rolling\w*|dataloader_threads|train_device|temp_device|latent_caching|clear_cache\w*|aspect_ratio_bucketing|"
    r"include_train_config|.*weight_dtype|fallback_train_dtype|unet\..*|(unconditional_)?transformer\..*|text_encoder(_\d)?\..*|prior\..*|vae\..*|"
    r"(effnet_encoder|decoder\w*|quantization|optimizer(_defaults)?)\..*|enable_\w+|layer_filter_preset|lora_layer_preset|multi_gpu|device_indexes|"
    r"only_cache|secrets.*|attention_mechanism|cloud\..*|.*_filename|.*offload.*|compile|frames|embedding\..*|non_blocking|gradient_\w+|"
    r"async_\w+|fused_gradient_reduce|image_caching|text_caching|caching_threads|prefetch_\w+|prevent_overwrites|non_ema_sampling|.*_sequence_length"
)
ONE_TRAINER_DEFAULTS = {
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
}

# -- ai-toolkit --


def _ai_toolkit(data: Mapping[str, Any]) -> Foreign:
    """The first process of a job and its first dataset; the rest is named."""
    process = data["process"][0] if isinstance(data["process"][0], dict) else {}
    flat = _flatten({key: value for key, value in process.items() if key != "datasets"})
    listed = process.get("datasets") or []
    if not isinstance(listed, list):
        raise ConfigError(f"{_shown('datasets', listed)} is no list of datasets.")
    datasets = [part for part in listed if isinstance(part, dict)]
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
        flat["train.ema_config.ema_decay"] = 0
    flat.setdefault("train.min_snr_gamma", 0)
    layers = _layers("linear+conv" if flat.get("network.conv") else "linear")
    found = _translate("ai-toolkit", flat, AI_TOOLKIT, AI_TOOLKIT_QUIET, AI_TOOLKIT_DEFAULTS)
    more = [
        f"{len(part) - 1} more {what}"
        for part, what in ((data["process"], "processes"), (datasets, "datasets"))
        if len(part) > 1
    ]
    return Foreign(found.program, layers | found.changes, [*found.left_out, *more, OUTER_LAYERS])


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
    "datasets.resolution": _resolutions,
    "datasets.shuffle_tokens": "dataset.shuffle_tags",
    "network.type": lambda value: {
        "adapter.kind": {"lora": "lora", "lokr": "lokr", "dora": "dora"}[value]
    },
    "network.linear": _number("adapter.rank", int),
    "network.linear_alpha": _number("adapter.alpha"),
    "network.conv": _number("adapter.conv_rank", int),
    "network.conv_alpha": _number("adapter.conv_alpha"),
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

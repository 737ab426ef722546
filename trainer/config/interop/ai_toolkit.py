"""ai-toolkit (YAML). A file is a job of processes, and a process has several datasets.

The first process and its first dataset are read; the others are reported as unsupported. Source
of the names: https://github.com/ostris/ai-toolkit, `config/examples`.
"""

from collections.abc import Mapping
from typing import Any

from trainer.config.interop import translation
from trainer.config.interop.translation import ForeignSettings, Table, number, whole_number
from trainer.errors import ConfigError

KINDS = {"lora": "lora", "lokr": "lokr", "dora": "dora"}


def matches(data: Mapping[str, Any]) -> bool:
    job = data.get("config")
    return isinstance(job, dict) and isinstance(job.get("process"), list) and bool(job["process"])


def read(data: Mapping[str, Any]) -> ForeignSettings:
    job = data["config"]
    processes = job["process"]
    process = processes[0] if isinstance(processes[0], dict) else {}
    datasets = _datasets(process)
    flat = translation.flatten({key: part for key, part in process.items() if key != "datasets"})
    if datasets:
        flat |= translation.flatten(datasets[0], "datasets.")
    flat["name"] = job.get("name")

    # Settings whose meaning depends on others become independent ones first.
    _resolve_learning_rates(flat)
    if not flat.pop("train.ema_config.use_ema", False):
        flat["train.ema_config.ema_decay"] = 0
    flat.setdefault("train.min_snr_gamma", 0)

    layers = translation.layers("linear+conv" if flat.get("network.conv") else "linear")
    changes, unsupported = translation.translate(TABLE, flat)
    if len(processes) > 1:
        unsupported.append(f"{len(processes) - 1} more processes")
    if len(datasets) > 1:
        unsupported.append(f"{len(datasets) - 1} more datasets")
    unsupported.append(translation.OUTER_LAYERS)
    return ForeignSettings("ai-toolkit", layers | changes, unsupported)


def _datasets(process: Mapping[str, Any]) -> list[dict[str, Any]]:
    datasets = process.get("datasets") or []
    if not isinstance(datasets, list):
        setting = translation.setting_text("datasets", datasets)
        raise ConfigError(f"{setting} is not a list of datasets. Correct it in the file.")
    return [dataset for dataset in datasets if isinstance(dataset, dict)]


def _resolve_learning_rates(flat: dict[str, Any]) -> None:
    """Replaces the switches of the parts by a learning rate for each part."""
    if flat.pop("train.train_unet", True) is False:
        flat["train.lr"], flat["text_lr"] = 0, flat.get("train.lr")
    elif flat.pop("train.train_text_encoder", False):
        flat["text_lr"] = flat.get("train.lr")
    else:
        flat["text_lr"] = 0
    flat.pop("train.train_text_encoder", None)


TABLE = Table(
    rules={
        "name": translation.output_name,
        "trigger_word": "dataset.trigger",
        "model.name_or_path": "base.model",
        "train.dtype": translation.precision("base.precision"),
        "save.dtype": translation.precision("saving.precision"),
        "datasets.folder_path": "dataset.folder",
        "datasets.caption_dropout_rate": number("dataset.caption_dropout"),
        "datasets.resolution": translation.resolutions,
        "datasets.shuffle_tokens": "dataset.shuffle_tags",
        "network.type": lambda value: {"adapter.kind": KINDS[value]},
        "network.linear": whole_number("adapter.rank"),
        "network.linear_alpha": number("adapter.alpha"),
        "network.conv": whole_number("adapter.conv_rank"),
        "network.conv_alpha": number("adapter.conv_alpha"),
        "train.lr": number("training.learning_rate"),
        "text_lr": number("training.text_encoder_learning_rate"),
        "train.steps": whole_number("training.steps"),
        "train.batch_size": whole_number("training.batch_size"),
        "train.gradient_accumulation_steps": whole_number("training.gradient_accumulation_steps"),
        "train.gradient_accumulation": whole_number("training.gradient_accumulation_steps"),
        "train.gradient_checkpointing": "training.gradient_checkpointing",
        "train.optimizer": translation.optimizer,
        "train.optimizer_params.weight_decay": number("training.weight_decay"),
        "train.lr_scheduler": translation.lr_schedule,
        "train.max_grad_norm": number("training.max_grad_norm"),
        "train.min_snr_gamma": number("objective.min_snr_gamma"),
        "train.noise_offset": number("objective.noise_offset"),
        "train.ema_config.ema_decay": number("training.ema_decay"),
        "sample.prompts": translation.sample_prompts,
        "sample.samples": translation.sample_prompts,
        "sample.neg": "sampling.negative_prompt",
        "sample.seed": whole_number("sampling.seed"),
        "sample.guidance_scale": number("sampling.guidance_scale"),
        "sample.sample_steps": whole_number("sampling.inference_steps"),
    },
    ignored=translation.names(
        r"""
        type training_folder device performance_log_every sqlite_db_path logging\..* save\..*
        meta.* sample\.(sampler|sample_every|width|height|walk_seed)
        datasets\.(caption_ext|cache_\w+|num_workers)
        train\.(noise_scheduler|cache_\w+|unload_\w+|skip_first_sample|disable_sampling|loss_type)
        model\.(arch|is_\w+|low_vram)
        """
    ),
    neutral={"train.content_or_style": "balanced", "train.timestep_type": "sigmoid"},
)

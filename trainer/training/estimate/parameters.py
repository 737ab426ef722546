"""Trainable parameters of a run."""

from collections.abc import Mapping

from trainer.config import Adapter, RunConfig
from trainer.lora import targets
from trainer.models.model_files import BaseFiles, inspect, locate
from trainer.models.safetensors_header import TensorInfo

TOKEN_TABLE = "token_embedding"  # of CLIP, in every layout of its weights

FILE_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}


def trainable_parameters(run: RunConfig) -> int | None:
    """All weights of the adapter; None where the base is not on this machine yet. Raises ConfigError where a setting fits no module."""
    parts = parameters_by_component(run)
    return None if parts is None else sum(parts.values()) + trigger_parameters(run)


def parameters_by_component(run: RunConfig) -> dict[str, int] | None:
    """Weights of the adapter: {"unet": ..., "text_encoder": ...}; None where the base is not on this machine yet.

    Raises ConfigError where a setting fits no module.
    """
    folder = locate(run.base)
    if folder is None:
        return None
    base, training = inspect(folder, run.base.t5), run.training
    parts = [
        part for part in (base.denoiser, *base.trainable_text_encoders) if training.rate_of(part)
    ]
    shapes = {part: targets.projections(base.tensors[part]) for part in parts}
    targets.check_names(run.adapter, shapes)
    return {part: adapter_parameters(run.adapter, part, base.tensors[part]) for part in parts}


def trigger_parameters(run: RunConfig) -> int:
    """Numbers of the trigger word's vectors, where they are learned; 0 also where the base is not on this machine yet."""
    folder = locate(run.base) if run.adapter.trigger_vectors else None
    if folder is None:
        return 0
    base = inspect(folder, run.base.t5)
    tables = [
        info
        for part in base.trainable_text_encoders
        for name, info in base.tensors[part].items()
        if TOKEN_TABLE in name
    ]
    return run.adapter.trigger_vectors * sum(table.shape[1] for table in tables)


def base_parameters(base: BaseFiles, component: str) -> int:
    return sum(info.numel for info in base.tensors[component].values())


def adapter_parameters(adapter: Adapter, component: str, tensors: Mapping[str, TensorInfo]) -> int:
    """Of one component: for LoRA rank x (inputs + outputs) for each adapted projection (Hu et al. 2021, section 4.1)."""
    chosen = targets.choose_targets(adapter, component, targets.projections(tensors))
    return sum(targets.adapter_parameters(adapter, target) for target in chosen)


def file_bytes(run: RunConfig) -> int | None:
    """Size of the finished file, its header of some kilobytes not counted."""
    parameters = trainable_parameters(run)
    return None if parameters is None else parameters * FILE_BYTES[run.saving.precision]

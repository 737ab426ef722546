"""Parameters of an adapter and of a base model, counted in the headers of the base's files."""

from collections.abc import Mapping

from trainer.config import Adapter, RunConfig
from trainer.lora import targets
from trainer.models.model_files import BaseFiles, inspect, locate
from trainer.models.safetensors_header import TensorInfo

TOKEN_TABLE = "token_embedding"
"""In the name of CLIP's table of token vectors, in every layout of its weights."""
FILE_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
"""Bytes per parameter in an adapter file, by `saving.precision`."""


def trainable_parameters(run: RunConfig) -> int | None:
    """Returns the number of trained weights, or None if the base is not on this machine yet.

    Raises ConfigError if a target setting matches no module.
    """
    parts = parameters_by_component(run)
    return None if parts is None else sum(parts.values()) + trigger_parameters(run)


def parameters_by_component(run: RunConfig) -> dict[str, int] | None:
    """Returns the adapter's weights in each component: {"unet": ..., "text_encoder": ...}.

    Returns None if the base is not on this machine yet. Raises ConfigError if a target setting
    matches no module.
    """
    folder = locate(run.base)
    if folder is None:
        return None
    base = inspect(folder, run.base.t5)
    candidates = (base.denoiser, *base.trainable_text_encoders)
    parts = [part for part in candidates if run.training.rate_of(part)]
    shapes = {part: targets.projections(base.tensors[part]) for part in parts}
    targets.check_names(run.adapter, shapes)
    return {part: adapter_parameters(run.adapter, part, base.tensors[part]) for part in parts}


def trigger_parameters(run: RunConfig) -> int:
    """Returns the size of the trigger word's vectors, if they are trained.

    Returns 0 if the base is not on this machine yet.
    """
    folder = locate(run.base) if run.adapter.trigger_vectors else None
    if folder is None:
        return 0
    base = inspect(folder, run.base.t5)
    width = 0
    for part in base.trainable_text_encoders:
        for name, info in base.tensors[part].items():
            if TOKEN_TABLE in name:
                width += info.shape[1]
    return run.adapter.trigger_vectors * width


def base_parameters(base: BaseFiles, component: str) -> int:
    """Returns the number of weights in a component of the base."""
    return sum(info.numel for info in base.tensors[component].values())


def adapter_parameters(adapter: Adapter, component: str, tensors: Mapping[str, TensorInfo]) -> int:
    """Returns the adapter's weights in one component.

    For LoRA these are rank x (inputs + outputs) of each adapted projection (Hu et al. 2021,
    arXiv:2106.09685, section 4.1).
    """
    chosen = targets.choose_targets(adapter, component, targets.projections(tensors))
    return sum(targets.adapter_parameters(adapter, target) for target in chosen)


def file_bytes(run: RunConfig) -> int | None:
    """Returns the size of an adapter file without its header, or None if the base is not here."""
    parameters = trainable_parameters(run)
    return None if parameters is None else parameters * FILE_BYTES[run.saving.precision]

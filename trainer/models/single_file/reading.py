"""Reads a base model in one .safetensors file: its family, configurations and tensors."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import safe_open

from trainer.errors import ModelError
from trainer.models.safetensors_header import Header, TensorInfo, read_header
from trainer.models.single_file.configs import (
    Config,
    check_uniform_depths,
    template_config,
    text_config,
    transformer_config,
    unet_config,
    vae_config,
)
from trainer.models.single_file.kinds import (
    PICKLES,
    SD3_T5,
    SD3_TEMPLATES,
    UNET,
    VAE,
    Layout,
    Tensors,
    below,
    find_layout,
)
from trainer.models.single_file.tensor_names import (
    text_encoder_tensors,
    transformer_tensors,
    unet_tensors,
)

DISTILLED = re.compile(
    r"(?<![a-z])(turbo|lightning|hyper|lcm|dmd2?|schnell)(?![a-z])", re.IGNORECASE
)
SD2_PROBE = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
SD2_PROBE_LIMIT = 0.09  # ComfyUI's; the standard deviation is larger in models with v prediction


@dataclass(frozen=True)
class SingleFile:
    """A single file that can be trained on."""

    template: str
    """Name of the folder in `trainer/families/configs` with the configurations of the family."""
    pipeline: str
    """Class name of the diffusers pipeline."""
    configs: dict[str, Config]
    """By component and for "scheduler", whose prediction_type is None if the file does not
    determine it."""
    tensors: dict[str, dict[str, TensorInfo]]
    """By component. The denoiser's and text encoders' tensors have the names of diffusers and
    transformers, the VAE's have LDM names."""
    notes: tuple[str, ...]
    """Sentences for the user about anything unusual."""


class Part(NamedTuple):
    """The configuration and tensors of one component."""

    config: Config
    tensors: dict[str, TensorInfo]


def read_single_file(path: Path) -> SingleFile:
    """Reads a base model in one file.

    Raises ModelError if it is not one; the message describes what the file is and what to do.
    """
    if path.suffix.lower() in PICKLES:
        raise ModelError(
            f"{path.name} is a pickle file, which can run code when opened, so it is never opened; "
            "convert it to .safetensors first (A1111 and ComfyUI can), or download that edition."
        )
    header = read_header(path)
    layout = find_layout(path.name, header.tensors)
    prediction_type = None
    if layout.template not in SD3_TEMPLATES:
        prediction_type = _prediction_type(path, header, layout.template)
    if layout.template == "sd21" and prediction_type == "epsilon":
        layout = layout._replace(template="sd21-base")
    try:
        parts = _read_parts(header.tensors, layout)
    except (KeyError, IndexError, ValueError, StopIteration):
        raise ModelError(
            f"{path.name} lacks tensors that every such model has; the file is incomplete. "
            "Download it again."
        ) from None
    scheduler = template_config(layout.template, "scheduler/scheduler_config.json")
    if "unet" in parts:
        check_uniform_depths(path.name, below(header.tensors, UNET), parts["unet"].config)
        scheduler["prediction_type"] = prediction_type
        if "ztsnr" in header.tensors:
            scheduler["rescale_betas_zero_snr"] = True
    return SingleFile(
        layout.template,
        template_config(layout.template, "model_index.json")["_class_name"],
        {part: read.config for part, read in parts.items()} | {"scheduler": scheduler},
        {part: read.tensors for part, read in parts.items()},
        _notes(path, header),
    )


def _read_parts(tensors: Tensors, layout: Layout) -> dict[str, Part]:
    """Returns the denoiser, the VAE and the text encoders, by component."""

    def template(part: str) -> Config:
        return template_config(layout.template, f"{part}/config.json")

    weights, vae = below(tensors, UNET), below(tensors, VAE)
    parts = {}
    if layout.template in SD3_TEMPLATES:
        config = transformer_config(weights, template("transformer"))
        parts["transformer"] = Part(config, transformer_tensors(weights))
    else:
        config = unet_config(weights, template("unet"))
        parts["unet"] = Part(config, unet_tensors(weights, config["layers_per_block"]))
    parts["vae"] = Part(vae_config(vae, template("vae")), vae)
    for part, prefix in layout.text_encoders.items():
        parts[part] = _read_text_encoder(below(tensors, prefix), template(part))
    return parts


def _read_text_encoder(tensors: Tensors, template: Config) -> Part:
    names = text_encoder_tensors(tensors)
    config = text_config(names, template)
    # The file of an SD 2.x contains one layer more than its encoder uses.
    unused = f"encoder.layers.{config['num_hidden_layers']}."
    return Part(config, {name: info for name, info in names.items() if unused not in name})


def _prediction_type(path: Path, header: Header, template: str) -> str | None:
    """Returns "epsilon" or "v_prediction", or None if the file does not determine it."""
    stated = _stated_prediction_type(header)
    if stated:
        return stated
    if "v_pred" in header.tensors:
        return "v_prediction"
    return _probe_sd2(path, header.tensors) if template == "sd21" else "epsilon"


def _stated_prediction_type(header: Header) -> str | None:
    """Returns the prediction type in the metadata (modelspec 1.0), or None if there is none."""
    architecture = header.metadata.get("modelspec.architecture", "")
    prediction = header.metadata.get("modelspec.prediction_type", "")
    if prediction in ("v", "v_prediction") or "768-v" in architecture:
        return "v_prediction"
    if prediction in ("epsilon", "eps") or "v2-512" in architecture:
        return "epsilon"
    return None


def _probe_sd2(path: Path, tensors: Tensors) -> str | None:
    """Returns the prediction type of an SD 2.x by ComfyUI's rule.

    In models with v prediction the bias of the last attention's first norm varies more. Returns
    None if the tensor is missing or stored in a type that NumPy does not have.
    """
    if SD2_PROBE not in tensors or tensors[SD2_PROBE].dtype not in ("F32", "F16"):
        return None
    with safe_open(path, framework="numpy") as file:
        bias = file.get_tensor(SD2_PROBE).astype(np.float64)
    return "v_prediction" if np.std(bias, ddof=1) > SD2_PROBE_LIMIT else "epsilon"


def _notes(path: Path, header: Header) -> tuple[str, ...]:
    notes = []
    if any(name.startswith(SD3_T5) for name in header.tensors):
        notes.append(
            f"The T5 in {path.name} is not used, because a single file has no vocabulary for it; "
            "captions are read with CLIP alone. Use the model as a diffusers folder to train "
            "with T5."
        )
    title = header.metadata.get("modelspec.title", "")
    distilled = DISTILLED.search(path.stem) or DISTILLED.search(title)
    if distilled:
        notes.append(
            f"{path.name} calls itself {distilled[0]}: a model distilled to few steps. Training "
            "weakens the distillation; an adapter trained on the ordinary model of the family "
            "works better on this one too."
        )
    return tuple(notes)

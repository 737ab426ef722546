"""Decides from the tensor names of a .safetensors file what it contains."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from trainer.errors import ModelError
from trainer.models.safetensors_header import TensorInfo

PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")

UNET = "model.diffusion_model."  # also the prefix of Stable Diffusion 3's transformer
VAE = "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
XL_CLIP, XL_OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
REFINER_CLIP = "conditioner.embedders.0.model."
SD3_CLIP_L = "text_encoders.clip_l.transformer."
SD3_CLIP_G = "text_encoders.clip_g.transformer."
SD3_T5 = "text_encoders.t5xxl.transformer."

SD3_TEMPLATES = ("sd3m", "sd35m", "sd35l")

INPUT_CHANNELS = {
    5: "a depth model (5 input channels)",
    7: "an upscaler (7 input channels)",
    8: "an instruct-pix2pix or similar editing model (8 input channels)",
    9: "an inpainting model (9 input channels)",
}
TRAINABLE_DTYPES = {"F64", "F32", "F16", "BF16"}

KINDS = {
    "an adapter (LoRA)": (
        r".*(lora_down|lora_up|lora_A|lora_B|hada_w1_a|lokr_w1|dora_scale)(\.weight)?"
        r"|lora_(unet|te)_.*"
    ),
    "a ControlNet": r"control_model\..*|controlnet_.*|input_hint_block\..*",
    "Flux or a relative of it": r"(model\.diffusion_model\.)?double_blocks\..*",
    "the transformer of a Stable Diffusion 3": r"(model\.diffusion_model\.)?joint_blocks\..*",
    "a checkpoint with EMA weights only": r"model_ema\..*",
    "another kind of image model": r"model\.diffusion_model\..*",
    "a UNet alone": r"(input_blocks|output_blocks|down_blocks|up_blocks)\..*",
    "a VAE": (
        r"(first_stage_model\.|vae\.)?"
        r"(encoder|decoder)\.(down|up|mid|conv_in|down_blocks|up_blocks).*"
    ),
    "a text encoder": (
        r"(text_model|encoder\.block|shared|transformer\.resblocks|cond_stage_model|conditioner"
        r"|text_encoders)\..*"
    ),
    "a textual inversion": r"emb_params|clip_[lg]|string_to_.*",
}
"""What a file may contain instead of a whole model -> a pattern of its tensor names. The first
kind with a matching tensor is taken."""

Tensors = Mapping[str, TensorInfo]
"""Tensor name -> type and shape."""


class Layout(NamedTuple):
    """The family that a file belongs to, and its text encoders."""

    template: str
    """Name of the folder in `trainer/families/configs` with the configurations of the family."""
    text_encoders: dict[str, str]
    """Component -> prefix of its tensor names in the file."""


def find_layout(name: str, tensors: Tensors) -> Layout:
    """Returns the layout of a whole Stable Diffusion model.

    Raises ModelError if the file contains anything else; the message describes it and starts with
    `name`, the name of the file.
    """
    if UNET + "joint_blocks.0.x_block.attn.qkv.weight" in tensors:
        _check_dtypes(name, tensors)
        return _sd3_layout(name, tensors)
    _check_input_channels(name, tensors)
    _check_dtypes(name, tensors)
    if any(key.startswith("edm_") for key in tensors):
        raise ModelError(
            f"{name} was trained with EDM's noise (it contains edm_ tensors); "
            "adapters are trained on epsilon or v prediction."
        )
    if _has(tensors, REFINER_CLIP):
        raise ModelError(f"{name} is the refiner of Stable Diffusion XL; train on the base model.")
    return _unet_layout(name, tensors)


def describe_kind(tensors: Tensors) -> str:
    """Returns a few words for a file that is not a whole Stable Diffusion, such as "a VAE"."""
    for words, pattern in KINDS.items():
        if any(re.fullmatch(pattern, name) for name in tensors):
            return words
    return f"a file of {len(tensors)} tensors (such as {next(iter(tensors), 'none')})"


def below(tensors: Tensors, prefix: str) -> dict[str, TensorInfo]:
    """Returns the tensors whose names start with the prefix, with the prefix removed."""
    return {
        name.removeprefix(prefix): info for name, info in tensors.items() if name.startswith(prefix)
    }


def _has(tensors: Tensors, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in tensors)


def _check_input_channels(name: str, tensors: Tensors) -> None:
    first = UNET + "input_blocks.0.0.weight"
    if first not in tensors:
        raise ModelError(
            f"{name} is {describe_kind(tensors)}, not a whole Stable Diffusion; "
            "use the full model that it belongs to as the base."
        )
    shape = tensors[first].shape
    if len(shape) != 4:
        raise ModelError(
            f"{name} is damaged: its input_blocks.0.0.weight is not a convolution. "
            "Download it again."
        )
    channels = shape[1]
    if channels != 4:
        kind = INPUT_CHANNELS.get(channels, f"a model with {channels} input channels")
        raise ModelError(
            f"{name} is {kind}; train on the ordinary model of the same family. "
            "The adapter then also works on this one."
        )


def _check_dtypes(name: str, tensors: Tensors) -> None:
    stored = {info.dtype for key, info in tensors.items() if key.startswith(UNET)}
    coarse = stored - TRAINABLE_DTYPES
    if coarse:
        raise ModelError(
            f"The denoiser of {name} is stored in {', '.join(sorted(coarse))}, "
            "which is too coarse to train on; download its fp16, bf16 or fp32 edition."
        )


def _unet_layout(name: str, tensors: Tensors) -> Layout:
    missing = []
    if not any(_has(tensors, prefix) for prefix in (CLIP, OPEN_CLIP, XL_CLIP)):
        missing.append("a text encoder")
    if not _has(tensors, VAE):
        missing.append("a VAE")
    if missing:
        raise ModelError(
            f"{name} contains a UNet without {' and '.join(missing)}; "
            "download the full model, or its diffusers folder."
        )
    has_size_embedding = UNET + "label_emb.0.0.weight" in tensors
    if has_size_embedding and _has(tensors, XL_CLIP) and _has(tensors, XL_OPEN_CLIP):
        return Layout("sdxl", {"text_encoder": XL_CLIP, "text_encoder_2": XL_OPEN_CLIP})
    if _has(tensors, OPEN_CLIP):
        return Layout("sd21", {"text_encoder": OPEN_CLIP})
    if _has(tensors, CLIP):
        return Layout("sd15", {"text_encoder": CLIP})
    raise ModelError(
        f"{name} contains the text encoders of one family and the UNet of another; "
        "it is damaged or was merged wrongly. Use another file."
    )


def _sd3_layout(name: str, tensors: Tensors) -> Layout:
    required = {SD3_CLIP_L: "CLIP-L", SD3_CLIP_G: "CLIP-G", VAE: "a VAE"}
    missing = [words for prefix, words in required.items() if not _has(tensors, prefix)]
    if missing:
        raise ModelError(
            f"{name} contains a Stable Diffusion 3 without {' and '.join(missing)}; "
            "download the edition with incl_clips in its name, or its diffusers folder."
        )
    has_second_attention = any(".x_block.attn2." in key for key in tensors)
    normalises_queries = UNET + "joint_blocks.0.x_block.attn.ln_q.weight" in tensors
    if has_second_attention:
        template = "sd35m"
    elif normalises_queries:
        template = "sd35l"
    else:
        template = "sd3m"
    return Layout(template, {"text_encoder": SD3_CLIP_L, "text_encoder_2": SD3_CLIP_G})

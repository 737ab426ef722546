"""A single-file checkpoint in Stability's (LDM) layout: what it is, told by its header before anything is loaded.

The file holds weights only. Its configurations are the public ones of its family (`families/configs`), with what the shapes of
its tensors say put before them; what shapes cannot say (head sizes, activations, the noise schedule) is the same in a whole family.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from trainer.errors import ModelError
from trainer.models.safetensors_header import Header, TensorInfo, read_header

CONFIGS_FOLDER = Path(__file__).resolve().parents[1] / "families" / "configs"
UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
XL_CLIP, XL_OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
REFINER_CLIP = "conditioner.embedders.0.model."
SD3_CLIP_L, SD3_CLIP_G, SD3_T5 = (
    f"text_encoders.{part}.transformer." for part in ("clip_l", "clip_g", "t5xxl")
)
SD3_TEMPLATES = ("sd3m", "sd35m", "sd35l")
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
BLOCK_LIMIT = 64  # Stable Diffusion 3.5 large has 38 blocks
HEAD = 64  # width of an attention head wherever a family fixes it (SD 2.x, XL and every CLIP text encoder)
INPUT_CHANNELS = {
    5: "a depth model (5 input channels)",
    7: "an upscaler (7 input channels)",
    8: "an instruct-pix2pix or similar editing model (8 input channels)",
    9: "an inpainting model (9 input channels)",
}
DISTILLED = re.compile(
    r"(?<![a-z])(turbo|lightning|hyper|lcm|dmd2?|schnell)(?![a-z])", re.IGNORECASE
)
SD2_PROBE = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that can be trained on."""

    template: str
    """Name of the folder in `families/configs` that its configurations were taken from."""
    pipeline: str
    configs: dict[str, dict[str, Any]]
    """By component, "scheduler" included; its prediction_type is None where nothing in the file tells it."""
    tensors: dict[str, dict[str, TensorInfo]]
    """By component; those of the denoiser and the text encoders under the names that diffusers and transformers give them."""
    notes: tuple[str, ...]
    """What is odd about it, in whole sentences."""


def read_checkpoint(path: Path) -> Checkpoint:
    """Raises ModelError that names what the file is instead, and what to do."""
    if path.suffix.lower() in PICKLES:
        raise ModelError(
            f"{path.name} is a pickle file, which can run code when opened, so it is never opened; "
            "convert it to .safetensors first (A1111 and ComfyUI can), or get that edition of the model."
        )
    header = read_header(path)
    template, text_encoders = _family(path.name, header.tensors)
    denoiser = "transformer" if template in SD3_TEMPLATES else "unet"
    prediction_type = None
    if template == "sd21":
        prediction_type = _said(header) or _sd2_prediction(path, header.tensors)
        template = "sd21-base" if prediction_type == "epsilon" else "sd21"
    elif denoiser == "unet":
        prediction_type = _said(header) or (
            "v_prediction" if "v_pred" in header.tensors else "epsilon"
        )
    index = template_config(template, "model_index.json")
    weights, vae = _below(header.tensors, UNET), _below(header.tensors, VAE)
    public = template_config(template, f"{denoiser}/config.json")
    try:
        config = (
            unet_config(weights, public)
            if denoiser == "unet"
            else transformer_config(weights, public)
        )
        configs = {
            denoiser: config,
            "vae": vae_config(vae, template_config(template, "vae/config.json")),
            "scheduler": template_config(template, "scheduler/scheduler_config.json"),
        }
        tensors = {
            denoiser: unet_tensors(weights, config)
            if denoiser == "unet"
            else transformer_tensors(weights),
            "vae": vae,
        }
        for part, prefix in text_encoders.items():
            names = text_encoder_tensors(_below(header.tensors, prefix))
            configs[part] = text_config(names, template_config(template, f"{part}/config.json"))
            last = f"encoder.layers.{configs[part]['num_hidden_layers']}."  # SD 2.x leaves the last layer of its encoder out
            tensors[part] = {name: info for name, info in names.items() if last not in name}
    except (KeyError, IndexError, ValueError, StopIteration):
        raise ModelError(
            f"{path.name} lacks tensors that every such model has; the file is incomplete. Download it again."
        ) from None
    if denoiser == "unet":
        _check_regular(path.name, weights, config)
        zero_snr = {"rescale_betas_zero_snr": True} if "ztsnr" in header.tensors else {}
        configs["scheduler"] |= {"prediction_type": prediction_type} | zero_snr
    return Checkpoint(template, index["_class_name"], configs, tensors, _notes(path, header))


def template_config(template: str, file: str) -> dict[str, Any]:
    return json.loads((CONFIGS_FOLDER / template / file).read_text(encoding="utf-8"))


def _below(tensors: Tensors, prefix: str) -> dict[str, TensorInfo]:
    return {
        name.removeprefix(prefix): info for name, info in tensors.items() if name.startswith(prefix)
    }


def _family(name: str, tensors: Tensors) -> tuple[str, dict[str, str]]:
    """The configurations that fit, and where in the file each text encoder begins."""
    if UNET + "joint_blocks.0.x_block.attn.qkv.weight" in tensors:
        return _sd3_family(name, tensors)
    if UNET + "input_blocks.0.0.weight" not in tensors:
        raise ModelError(
            f"{name} is {what_it_is(tensors)}, not a whole Stable Diffusion; give the checkpoint it belongs to as the base."
        )
    shape = tensors[UNET + "input_blocks.0.0.weight"].shape
    if len(shape) != 4:
        raise ModelError(
            f"{name} is damaged: its input_blocks.0.0.weight is no convolution. Download it again."
        )
    channels = shape[1]
    if channels != 4:
        raise ModelError(
            f"{name} is {INPUT_CHANNELS.get(channels, f'a model with {channels} input channels')}; "
            "train on the ordinary model of the same family, the adapter then works on this one too."
        )
    _check_dtypes(name, tensors)
    if any(key.startswith("edm_") for key in tensors):
        raise ModelError(
            f"{name} was trained with EDM's noise (it holds edm_ tensors); adapters are trained on epsilon or v prediction."
        )
    starts = {
        prefix: any(key.startswith(prefix) for key in tensors)
        for prefix in (CLIP, OPEN_CLIP, XL_CLIP, XL_OPEN_CLIP, REFINER_CLIP, VAE)
    }
    if starts[REFINER_CLIP]:
        raise ModelError(f"{name} is the refiner of Stable Diffusion XL; train on the base model.")
    lacking = (
        [] if any(starts[prefix] for prefix in (CLIP, OPEN_CLIP, XL_CLIP)) else ["a text encoder"]
    )
    lacking += [] if starts[VAE] else ["a VAE"]
    if lacking:
        raise ModelError(
            f"{name} holds a UNet without {' and '.join(lacking)}; get the full checkpoint, or its diffusers folder."
        )
    if UNET + "label_emb.0.0.weight" in tensors and starts[XL_CLIP] and starts[XL_OPEN_CLIP]:
        return "sdxl", {"text_encoder": XL_CLIP, "text_encoder_2": XL_OPEN_CLIP}
    if starts[OPEN_CLIP]:
        return "sd21", {"text_encoder": OPEN_CLIP}
    if starts[CLIP]:
        return "sd15", {"text_encoder": CLIP}
    raise ModelError(
        f"{name} holds the text encoders of one family and the UNet of another; it is damaged or merged wrongly."
    )


def _sd3_family(name: str, tensors: Tensors) -> tuple[str, dict[str, str]]:
    _check_dtypes(name, tensors)
    lacking = [
        words
        for prefix, words in {SD3_CLIP_L: "CLIP-L", SD3_CLIP_G: "CLIP-G", VAE: "a VAE"}.items()
        if not any(key.startswith(prefix) for key in tensors)
    ]
    if lacking:
        raise ModelError(
            f"{name} holds a Stable Diffusion 3 without {' and '.join(lacking)}; "
            "get the edition whose name says incl_clips, or its diffusers folder."
        )
    second = any(".x_block.attn2." in key for key in tensors)
    normed = UNET + "joint_blocks.0.x_block.attn.ln_q.weight" in tensors
    return "sd35m" if second else "sd35l" if normed else "sd3m", {
        "text_encoder": SD3_CLIP_L,
        "text_encoder_2": SD3_CLIP_G,
    }


def _check_dtypes(name: str, tensors: Tensors) -> None:
    coarse = {info.dtype for key, info in tensors.items() if key.startswith(UNET)} - {
        "F64",
        "F32",
        "F16",
        "BF16",
    }
    if coarse:
        odd = ", ".join(sorted(coarse))
        raise ModelError(
            f"The UNet of {name} is stored in {odd}, too coarse to train on; get its fp16, bf16 or fp32 edition."
        )


KINDS = {
    "an adapter (LoRA)": r".*(lora_down|lora_up|lora_A|lora_B|hada_w1_a|lokr_w1|dora_scale)(\.weight)?|lora_(unet|te)_.*",
    "a ControlNet": r"control_model\..*|controlnet_.*|input_hint_block\..*",
    "Flux or a relative of it": r"(model\.diffusion_model\.)?double_blocks\..*",
    "the transformer of a Stable Diffusion 3": r"(model\.diffusion_model\.)?joint_blocks\..*",
    "a checkpoint with EMA weights only": r"model_ema\..*",
    "another kind of image model": r"model\.diffusion_model\..*",
    "a UNet alone": r"(input_blocks|output_blocks|down_blocks|up_blocks)\..*",
    "a VAE": r"(first_stage_model\.|vae\.)?(encoder|decoder)\.(down|up|mid|conv_in|down_blocks|up_blocks).*",
    "a text encoder": r"(text_model|encoder\.block|shared|transformer\.resblocks|cond_stage_model|conditioner|text_encoders)\..*",
    "a textual inversion": r"emb_params|clip_[lg]|string_to_.*",
}


def what_it_is(tensors: Tensors) -> str:
    """In words, for a file that is no Stable Diffusion: "a VAE"."""
    for words, pattern in KINDS.items():
        if any(re.fullmatch(pattern, name) for name in tensors):
            return words
    return f"a file of {len(tensors)} tensors (such as {next(iter(tensors), 'none')})"


def _said(header: Header) -> str | None:
    """The prediction type that the metadata tells (modelspec 1.0)."""
    architecture, prediction = (
        header.metadata.get("modelspec.architecture", ""),
        header.metadata.get("modelspec.prediction_type", ""),
    )
    if prediction in ("v", "v_prediction") or "768-v" in architecture:
        return "v_prediction"
    return "epsilon" if prediction in ("epsilon", "eps") or "v2-512" in architecture else None


def _sd2_prediction(path: Path, tensors: Tensors) -> str | None:
    """ComfyUI's rule: the bias of the last attention's first norm spreads by more than 0.09 in models with v prediction."""
    if "v_pred" in tensors:
        return "v_prediction"
    if SD2_PROBE not in tensors or tensors[SD2_PROBE].dtype not in ("F32", "F16"):
        return None
    with safe_open(path, framework="numpy") as file:
        return (
            "v_prediction"
            if np.std(file.get_tensor(SD2_PROBE).astype(np.float64), ddof=1) > 0.09
            else "epsilon"
        )


def _notes(path: Path, header: Header) -> tuple[str, ...]:
    notes = []
    if any(name.startswith(SD3_T5) for name in header.tensors):
        notes.append(
            f"The T5 in {path.name} is left out, since a single file has no vocabulary for it; captions are read with CLIP alone. "
            "With the model as a diffusers folder T5 is used."
        )
    distilled = DISTILLED.search(path.stem) or DISTILLED.search(
        header.metadata.get("modelspec.title", "")
    )
    if distilled:
        notes.append(
            f"{path.name} calls itself {distilled[0]}: a model distilled to few steps. Training loosens that; "
            "an adapter trained on the ordinary model of the family works on it better."
        )
    return tuple(notes)


# --- What the shapes say -------------------------------------------------------------------------------------------------------


def _block(name: str, place: int = 1) -> int:
    """The number of the block that a tensor is of. It becomes a size, so ValueError for one that no family has."""
    number = int(name.split(".")[place])
    if not 0 <= number < BLOCK_LIMIT:
        raise ValueError(name)
    return number


def unet_config(tensors: Tensors, template: dict[str, Any]) -> dict[str, Any]:
    """Blocks, widths and depths of a UNet with LDM names. Raises KeyError for one that lacks blocks."""
    downsamplers = sorted(
        _block(name) for name in tensors if re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", name)
    )
    layers = (
        downsamplers[0] - 1
        if downsamplers
        else max(_block(name) for name in tensors if name.startswith("input_blocks."))
    )
    firsts = [(layers + 1) * block + 1 for block in range(len(downsamplers) + 1)]
    channels = [tensors[f"input_blocks.{n}.0.in_layers.2.weight"].shape[0] for n in firsts]
    depths = [transformer_depth(tensors, f"input_blocks.{n}.1") for n in firsts]
    attention = next(name for name in sorted(tensors) if name.endswith("attn2.to_k.weight"))
    config = template | {
        "in_channels": tensors["input_blocks.0.0.weight"].shape[1],
        "out_channels": tensors["out.2.weight"].shape[0],
        "layers_per_block": layers,
        "block_out_channels": channels,
        "down_block_types": [
            "CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths
        ],
        "up_block_types": [
            "CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)
        ],
        "cross_attention_dim": tensors[attention].shape[1],
    }
    if isinstance(
        template["attention_head_dim"], list
    ):  # a number of heads there, despite its name; SD 1.x has 8 everywhere
        config["attention_head_dim"] = [max(1, width // HEAD) for width in channels]
    if "transformer_layers_per_block" in template:
        config["transformer_layers_per_block"] = [max(1, depth) for depth in depths]
    if "projection_class_embeddings_input_dim" in template:
        config["projection_class_embeddings_input_dim"] = tensors["label_emb.0.0.weight"].shape[1]
    return config


def transformer_config(tensors: Tensors, template: dict[str, Any]) -> dict[str, Any]:
    """Depth and widths of an MMDiT with the names of its makers (Esser et al. 2024). Raises KeyError for one that lacks blocks."""
    patches, context = (
        tensors["x_embedder.proj.weight"].shape,
        tensors["context_embedder.weight"].shape,
    )
    second = sorted({_block(name) for name in tensors if ".x_block.attn2.qkv.weight" in name})
    config = template | {
        "in_channels": patches[1],
        "out_channels": tensors["final_layer.linear.weight"].shape[0] // patches[2] ** 2,
        "patch_size": patches[2],
        "num_layers": 1 + max(_block(name) for name in tensors if name.startswith("joint_blocks.")),
        "num_attention_heads": patches[0] // HEAD,
        "joint_attention_dim": context[1],
        "caption_projection_dim": context[0],
        "pooled_projection_dim": tensors["y_embedder.mlp.0.weight"].shape[1],
        "pos_embed_max_size": math.isqrt(tensors["pos_embed"].shape[1]),
    }
    return config | ({"dual_attention_layers": second} if second else {})


def transformer_depth(tensors: Tensors, place: str) -> int:
    depth = 0
    while f"{place}.transformer_blocks.{depth}.attn1.to_q.weight" in tensors:
        depth += 1
    return depth


def _check_regular(name: str, tensors: Tensors, config: Mapping[str, Any]) -> None:
    """Every layer of a level must be alike; those of pruned relatives (SSD-1B, Vega) are not, and their adapters fit nowhere else."""
    layers, levels = config["layers_per_block"], len(config["block_out_channels"])
    depths = {"middle_block.1": 0}
    for level in range(levels):
        first = (layers + 1) * level + 1
        depth = transformer_depth(tensors, f"input_blocks.{first}.1")
        depths |= {f"input_blocks.{first + layer}.1": depth for layer in range(layers)}
        depths |= {
            f"output_blocks.{(layers + 1) * (levels - 1 - level) + layer}.1": depth
            for layer in range(layers + 1)
        }
        depths["middle_block.1"] = max(1, depth)
    odd = [place for place, depth in depths.items() if transformer_depth(tensors, place) != depth]
    if odd:
        raise ModelError(
            f"{name} has a pruned or incomplete UNet ({odd[0]} differs from its neighbours, as in SSD-1B); "
            "train on the full model of the family."
        )


def vae_config(tensors: Tensors, template: dict[str, Any]) -> dict[str, Any]:
    """Widths and depth of a VAE with LDM names. Raises KeyError for one that lacks blocks."""
    levels = 1 + max(_block(name, 2) for name in tensors if name.startswith("encoder.down."))
    layers = sum(
        re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", name) is not None
        for name in tensors
    )
    return template | {
        "block_out_channels": [
            tensors[f"encoder.down.{level}.block.{layers - 1}.conv2.weight"].shape[0]
            for level in range(levels)
        ],
        "layers_per_block": layers,
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def text_config(tensors: Tensors, template: dict[str, Any]) -> dict[str, Any]:
    """Widths and depth of a CLIP text encoder with transformers' names. Raises KeyError for one that lacks layers."""
    names = (name.removeprefix("text_model.") for name in tensors)
    layers = 1 + max(_block(name, 2) for name in names if name.startswith("encoder.layers."))
    width = tensors["text_model.embeddings.token_embedding.weight"].shape[1]
    config = template | {
        "vocab_size": tensors["text_model.embeddings.token_embedding.weight"].shape[0],
        "max_position_embeddings": tensors["text_model.embeddings.position_embedding.weight"].shape[
            0
        ],
        "hidden_size": width,
        "intermediate_size": tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_attention_heads": max(1, width // HEAD),
        "num_hidden_layers": layers
        - (template["num_hidden_layers"] == 23),  # SD 2.x: of the file's 24 the last is unused
    }
    if "text_projection.weight" in tensors:
        config["projection_dim"] = tensors["text_projection.weight"].shape[0]
    return config


# --- LDM names as diffusers and transformers have them --------------------------------------------------------------------------

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
OUTSIDE_BLOCKS = {
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
OPEN_CLIP_NAMES = {
    "transformer.resblocks.": "text_model.encoder.layers.",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.": "self_attn.",
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
}


def unet_tensors(tensors: Tensors, config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    return {unet_name(name, config["layers_per_block"]): info for name, info in tensors.items()}


def transformer_tensors(tensors: Tensors) -> dict[str, TensorInfo]:
    """Those of an MMDiT with its projections under diffusers' names; query, key and value are one tensor, which counts as three."""
    renamed = {}
    for name, info in tensors.items():
        match = re.fullmatch(
            r"joint_blocks\.(\d+)\.(x|context)_block\.(attn2?)\.(qkv|proj)\.(weight|bias)", name
        )
        if not match:
            renamed[name] = info
            continue
        layer, stream, attention, projection, kind = match.groups()
        place = f"transformer_blocks.{layer}.{attention}"
        if projection == "proj":
            renamed[f"{place}.{'to_out.0' if stream == 'x' else 'to_add_out'}.{kind}"] = info
        else:
            part = TensorInfo(info.dtype, (info.shape[0] // 3, *info.shape[1:]))
            renamed |= {
                f"{place}.{f'to_{x}' if stream == 'x' else f'add_{x}_proj'}.{kind}": part
                for x in "qkv"
            }
    return renamed


def unet_name(name: str, layers: int) -> str:
    """A tensor's name in diffusers' UNet2DConditionModel: "input_blocks.4.1.norm.weight" -> "down_blocks.1.attentions.0.norm.weight"."""
    path, _, kind = name.rpartition(".")
    if path in OUTSIDE_BLOCKS:
        return f"{OUTSIDE_BLOCKS[path]}.{kind}"
    match = re.fullmatch(r"(input_blocks|output_blocks|middle_block)\.(\d+)\.?(\d+)?\.?(.*)", path)
    if not match:
        return name
    side, number = match[1], int(match[2])
    if side == "middle_block":
        inside = path.split(".", 2)[2]
        return (
            f"mid_block.attentions.0.{inside}.{kind}"
            if number == 1
            else f"mid_block.resnets.{number // 2}.{RESNET.get(inside, inside)}.{kind}"
        )
    block, layer = divmod(number - (side == "input_blocks"), layers + 1)
    place, inside = f"{'down' if side == 'input_blocks' else 'up'}_blocks.{block}", match[4]
    if inside == "op":
        return f"{place}.downsamplers.0.conv.{kind}"
    if inside == "conv":
        return f"{place}.upsamplers.0.conv.{kind}"
    if match[3] == "0":
        return f"{place}.resnets.{layer}.{RESNET.get(inside, inside)}.{kind}"
    return f"{place}.attentions.{layer}.{inside}.{kind}"


def text_encoder_tensors(tensors: Tensors) -> dict[str, TensorInfo]:
    """Tensors of a CLIP text encoder under transformers' names; OpenCLIP's query, key and value are one tensor, which counts as three."""
    if not any(name.startswith("transformer.resblocks.") for name in tensors):
        return dict(tensors)
    renamed: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        for theirs, ours in OPEN_CLIP_NAMES.items():
            name = name.replace(theirs, ours)
        if "in_proj_" in name:
            part = TensorInfo(info.dtype, (info.shape[0] // 3, *info.shape[1:]))
            renamed |= {
                name.replace("in_proj_", f"{projection}_proj."): part for projection in "qkv"
            }
        else:
            renamed["text_projection.weight" if name == "text_projection" else name] = info
    return {name: info for name, info in renamed.items() if name != "logit_scale"}

"""Derives the configurations that diffusers and transformers need from the shapes of tensors.

Each function takes the tensors of one component under LDM names and the public configuration of
its family, and returns that configuration with every value that shapes determine replaced. A
component with missing blocks raises KeyError, IndexError, ValueError or StopIteration.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from trainer.errors import ModelError
from trainer.models.single_file.kinds import Tensors

CONFIGS_FOLDER = Path(__file__).resolve().parents[2] / "families" / "configs"
MAX_BLOCKS = 64  # Stable Diffusion 3.5 Large has 38
HEAD_SIZE = 64  # of SD 2.x, SDXL and every CLIP text encoder; SD 1.x has 8 heads of any size

Config = dict[str, Any]
"""The contents of a config.json."""


def template_config(template: str, file: str) -> Config:
    """Returns a shipped configuration: `template_config("sdxl", "unet/config.json")`."""
    config: Config = json.loads((CONFIGS_FOLDER / template / file).read_text(encoding="utf-8"))
    return config


def unet_config(tensors: Tensors, template: Config) -> Config:
    """Returns the configuration of a UNet: its blocks, widths and transformer depths."""
    layers, levels = _unet_layers_and_levels(tensors)
    first_blocks = [_input_block(layers, level) for level in range(levels)]
    widths = [tensors[f"input_blocks.{n}.0.in_layers.2.weight"].shape[0] for n in first_blocks]
    depths = [_transformer_depth(tensors, f"input_blocks.{n}.1") for n in first_blocks]
    text_key = next(name for name in sorted(tensors) if name.endswith("attn2.to_k.weight"))
    down_types = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    up_types = ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)]
    config = template | {
        "in_channels": tensors["input_blocks.0.0.weight"].shape[1],
        "out_channels": tensors["out.2.weight"].shape[0],
        "layers_per_block": layers,
        "block_out_channels": widths,
        "down_block_types": down_types,
        "up_block_types": up_types,
        "cross_attention_dim": tensors[text_key].shape[1],
    }
    # Despite its name this is a number of heads. SD 1.x has 8 at every level, as a plain number.
    if isinstance(template["attention_head_dim"], list):
        config["attention_head_dim"] = [max(1, width // HEAD_SIZE) for width in widths]
    if "transformer_layers_per_block" in template:
        config["transformer_layers_per_block"] = [max(1, depth) for depth in depths]
    if "projection_class_embeddings_input_dim" in template:
        config["projection_class_embeddings_input_dim"] = tensors["label_emb.0.0.weight"].shape[1]
    return config


def transformer_config(tensors: Tensors, template: Config) -> Config:
    """Returns the configuration of an MMDiT, the transformer of Stable Diffusion 3.

    Source: Esser et al. 2024, arXiv:2403.03206.
    """
    patches = tensors["x_embedder.proj.weight"].shape
    context = tensors["context_embedder.weight"].shape
    blocks = {_block_number(name) for name in tensors if name.startswith("joint_blocks.")}
    with_second_attention = {
        _block_number(name) for name in tensors if ".x_block.attn2.qkv.weight" in name
    }
    config = template | {
        "in_channels": patches[1],
        "out_channels": tensors["final_layer.linear.weight"].shape[0] // patches[2] ** 2,
        "patch_size": patches[2],
        "num_layers": 1 + max(blocks),
        "num_attention_heads": patches[0] // HEAD_SIZE,
        "joint_attention_dim": context[1],
        "caption_projection_dim": context[0],
        "pooled_projection_dim": tensors["y_embedder.mlp.0.weight"].shape[1],
        "pos_embed_max_size": math.isqrt(tensors["pos_embed"].shape[1]),
    }
    if with_second_attention:
        config["dual_attention_layers"] = sorted(with_second_attention)
    return config


def vae_config(tensors: Tensors, template: Config) -> Config:
    """Returns the configuration of a VAE: its widths and depth."""
    levels = 1 + max(_block_number(name, 2) for name in tensors if name.startswith("encoder.down."))
    first_level = re.compile(r"encoder\.down\.0\.block\.\d+\.conv1\.weight")
    layers = sum(first_level.fullmatch(name) is not None for name in tensors)
    last_convolutions = [
        f"encoder.down.{level}.block.{layers - 1}.conv2.weight" for level in range(levels)
    ]
    return template | {
        "block_out_channels": [tensors[name].shape[0] for name in last_convolutions],
        "layers_per_block": layers,
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def text_config(tensors: Tensors, template: Config) -> Config:
    """Returns the configuration of a CLIP text encoder, from tensors under transformers' names."""
    names = (name.removeprefix("text_model.") for name in tensors)
    layers = 1 + max(_block_number(name, 2) for name in names if name.startswith("encoder.layers."))
    if template["num_hidden_layers"] == 23:
        layers -= 1  # the file of an SD 2.x has 24 layers, and the last one is never used
    embedding = tensors["text_model.embeddings.token_embedding.weight"].shape
    positions = tensors["text_model.embeddings.position_embedding.weight"].shape
    config = template | {
        "vocab_size": embedding[0],
        "max_position_embeddings": positions[0],
        "hidden_size": embedding[1],
        "intermediate_size": tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_attention_heads": max(1, embedding[1] // HEAD_SIZE),
        "num_hidden_layers": layers,
    }
    if "text_projection.weight" in tensors:
        config["projection_dim"] = tensors["text_projection.weight"].shape[0]
    return config


def check_uniform_depths(name: str, tensors: Tensors, config: Config) -> None:
    """Raises ModelError unless all layers of a UNet level have equally many transformer blocks.

    Pruned models (SSD-1B, Vega) do not, and an adapter trained on one fits no other model. `name`
    is the name of the file.
    """
    layers, levels = config["layers_per_block"], len(config["block_out_channels"])
    expected = {"middle_block.1": 0}
    for level in range(levels):
        depth = _transformer_depth(tensors, f"input_blocks.{_input_block(layers, level)}.1")
        for layer in range(layers):
            expected[f"input_blocks.{_input_block(layers, level) + layer}.1"] = depth
        first_output = (layers + 1) * (levels - 1 - level)
        for layer in range(layers + 1):
            expected[f"output_blocks.{first_output + layer}.1"] = depth
        expected["middle_block.1"] = max(1, depth)
    for path, depth in expected.items():
        if _transformer_depth(tensors, path) != depth:
            raise ModelError(
                f"{name} has a pruned or incomplete UNet ({path} differs from its neighbours, "
                "as in SSD-1B); train on the full model of the family."
            )


def _unet_layers_and_levels(tensors: Tensors) -> tuple[int, int]:
    """Returns the layers per level and the number of levels; each level but the last downsamples.

    A level of `layers` blocks and its downsampler are numbered consecutively from 1, so the first
    downsampler has the number `layers + 1`.
    """
    downsampler = re.compile(r"input_blocks\.\d+\.0\.op\.weight")
    downsamplers = [_block_number(name) for name in tensors if downsampler.fullmatch(name)]
    if downsamplers:
        return min(downsamplers) - 1, len(downsamplers) + 1
    blocks = [_block_number(name) for name in tensors if name.startswith("input_blocks.")]
    return max(blocks), 1


def _input_block(layers: int, level: int) -> int:
    """Returns the number of the first input block of a level."""
    return (layers + 1) * level + 1


def _block_number(name: str, position: int = 1) -> int:
    """Returns the block number in a tensor's name: its dot-separated word at this position.

    The number becomes a size, so ValueError is raised if it is larger than in any family.
    """
    number = int(name.split(".")[position])
    if not 0 <= number < MAX_BLOCKS:
        raise ValueError(name)
    return number


def _transformer_depth(tensors: Tensors, path: str) -> int:
    """Returns the number of transformer blocks at a path such as "input_blocks.4.1"."""
    depth = 0
    while f"{path}.transformer_blocks.{depth}.attn1.to_q.weight" in tensors:
        depth += 1
    return depth

"""Maps the tensor names of LDM files to the names in diffusers and transformers.

Some files store the query, key and value projections of an attention as one tensor. It becomes
three entries here, each with a third of its rows.
"""

import re

from trainer.models.safetensors_header import TensorInfo
from trainer.models.single_file.kinds import Tensors

RESNET_PARTS = {
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
UNET_BLOCK = re.compile(r"(input_blocks|output_blocks|middle_block)\.(\d+)\.?(\d+)?\.?(.*)")
MMDIT_ATTENTION = re.compile(
    r"joint_blocks\.(\d+)\.(x|context)_block\.(attn2?)\.(qkv|proj)\.(weight|bias)"
)


def unet_tensors(tensors: Tensors, layers: int) -> dict[str, TensorInfo]:
    """Returns the tensors of a UNet under the names of diffusers' UNet2DConditionModel."""
    return {unet_name(name, layers): info for name, info in tensors.items()}


def unet_name(name: str, layers: int) -> str:
    """Returns a tensor's name in diffusers' UNet2DConditionModel.

    "input_blocks.4.1.norm.weight" becomes "down_blocks.1.attentions.0.norm.weight" in a UNet with
    `layers` = 2 layers per block.
    """
    path, _, kind = name.rpartition(".")
    if path in OUTSIDE_BLOCKS:
        return f"{OUTSIDE_BLOCKS[path]}.{kind}"
    match = UNET_BLOCK.fullmatch(path)
    if not match:
        return name
    side, number, slot, inside = match[1], int(match[2]), match[3], match[4]
    if side == "middle_block":
        return f"{_middle_path(number, path.split('.', 2)[2])}.{kind}"
    if side == "input_blocks":
        block, layer = divmod(number - 1, layers + 1)
        return f"{block_path(f'down_blocks.{block}', layer, slot, inside)}.{kind}"
    block, layer = divmod(number, layers + 1)
    return f"{block_path(f'up_blocks.{block}', layer, slot, inside)}.{kind}"


def _middle_path(number: int, inside: str) -> str:
    """Returns the path of a module in the middle block: a ResNet, an attention and a ResNet."""
    if number == 1:
        return f"mid_block.attentions.0.{inside}"
    return f"mid_block.resnets.{number // 2}.{RESNET_PARTS.get(inside, inside)}"


def block_path(block: str, layer: int, slot: str, inside: str) -> str:
    """Returns the path of a module in a down or up block; slot "0" is the ResNet of a layer."""
    if inside == "op":
        return f"{block}.downsamplers.0.conv"
    if inside == "conv":
        return f"{block}.upsamplers.0.conv"
    if slot == "0":
        return f"{block}.resnets.{layer}.{RESNET_PARTS.get(inside, inside)}"
    return f"{block}.attentions.{layer}.{inside}"


def transformer_tensors(tensors: Tensors) -> dict[str, TensorInfo]:
    """Returns the tensors of an MMDiT with its attention projections under diffusers' names."""
    renamed = {}
    for name, info in tensors.items():
        match = MMDIT_ATTENTION.fullmatch(name)
        if not match:
            renamed[name] = info
            continue
        layer, stream, attention, projection, kind = match.groups()
        path = f"transformer_blocks.{layer}.{attention}"
        if projection == "proj":
            output = "to_out.0" if stream == "x" else "to_add_out"
            renamed[f"{path}.{output}.{kind}"] = info
            continue
        for letter in "qkv":
            third = f"to_{letter}" if stream == "x" else f"add_{letter}_proj"
            renamed[f"{path}.{third}.{kind}"] = _third(info)
    return renamed


def text_encoder_tensors(tensors: Tensors) -> dict[str, TensorInfo]:
    """Returns the tensors of a CLIP text encoder under transformers' names.

    A file contains either these names already or those of OpenCLIP.
    """
    if not any(name.startswith("transformer.resblocks.") for name in tensors):
        return dict(tensors)
    renamed: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        for open_clip, transformers in OPEN_CLIP_NAMES.items():
            name = name.replace(open_clip, transformers)
        if "in_proj_" in name:
            for letter in "qkv":
                renamed[name.replace("in_proj_", f"{letter}_proj.")] = _third(info)
        elif name == "text_projection":
            renamed["text_projection.weight"] = info
        elif name != "logit_scale":
            renamed[name] = info
    return renamed


def _third(info: TensorInfo) -> TensorInfo:
    return TensorInfo(info.dtype, (info.shape[0] // 3, *info.shape[1:]))

"""Module paths in the code and checkpoints of Stability AI, and the same modules in diffusers."""

import re

from trainer.models.single_file.tensor_names import OUTSIDE_BLOCKS, RESNET_PARTS, block_path

# The file format names only layers that can have an adapter, so it leaves out the last norm.
SINGLE_MODULES = {ldm: name for ldm, name in OUTSIDE_BLOCKS.items() if ldm != "out.0"}
MIDDLE_PARTS = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
LAYERS_PER_BLOCK = 2
"""In every UNet that Stability published."""


def from_ldm(path: str) -> str:
    """Returns the diffusers path of a module in Stability's UNet, or the path itself if unknown.

    input_blocks.4.1.proj_in -> down_blocks.1.attentions.0.proj_in
    """
    if path in SINGLE_MODULES:
        return SINGLE_MODULES[path]
    match = re.fullmatch(r"(input|middle|output)_blocks?\.(\d+)(?:\.(\d+))?(?:\.(.+))?", path)
    if match is None:
        return path
    side, number, part, inside = match[1], int(match[2]), match[3], match[4] or ""
    if side == "middle":
        # middle_block.1.transformer_blocks.0...: the first number selects the resnet or attention,
        # and a second number belongs to the path inside it.
        inside = ".".join(filter(None, [part, inside]))
        if number >= len(MIDDLE_PARTS):
            return path
        return f"{MIDDLE_PARTS[number]}.{RESNET_PARTS.get(inside, inside)}"

    # The input side counts its first convolution as block 0.
    block, layer = divmod(number - (side == "input"), LAYERS_PER_BLOCK + 1)
    name = "down_blocks" if side == "input" else "up_blocks"
    return block_path(f"{name}.{block}", layer, part, inside)


def to_ldm(module: str) -> str:
    """Returns the path in Stability's UNet of a diffusers module. Raises ValueError if unknown.

    down_blocks.1.attentions.0.proj_in -> input_blocks.4.1.proj_in

    Stability numbers the layers and resamplers of all blocks of a side in one sequence. On the
    input side 0 is the first convolution.
    """
    for ldm, diffusers in SINGLE_MODULES.items():
        if module == diffusers:
            return ldm
    match = re.fullmatch(
        r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?"
        r"\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)",
        module,
    )
    if match is None:
        raise ValueError(f"{module} does not exist in Stability's UNet")
    side, block, layer_kind = match[1], int(match[2] or 0), match[3]
    layer, inside = int(match[4]), match[5]

    number = (LAYERS_PER_BLOCK + 1) * block + layer
    if layer_kind == "downsamplers":
        return f"input_blocks.{number + LAYERS_PER_BLOCK + 1}.0.op"
    if layer_kind == "upsamplers":
        return f"output_blocks.{number + LAYERS_PER_BLOCK}.2.{inside}"
    if layer_kind == "resnets":
        ldm_parts = {diffusers: ldm for ldm, diffusers in RESNET_PARTS.items()}
        inside = ldm_parts.get(inside, inside)
    part = {"resnets": 0, "attentions": 1}[layer_kind]
    if side == "mid_block":
        return f"middle_block.{1 if part else 2 * layer}.{inside}"
    if side == "down_blocks":
        return f"input_blocks.{number + 1}.{part}.{inside}"
    return f"output_blocks.{number}.{part}.{inside}"


MMDIT_PARTS = {
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
MMDIT_FUSED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
"""Projections that are one layer in Stability's MMDiT and three in diffusers."""


def from_mmdit(path: str) -> str:
    """Returns the diffusers path of a module in Stability's MMDiT, or the path itself if unknown.

    A fused projection keeps its name inside the block. The reader splits it with its tensors.
    """
    match = re.fullmatch(r"joint_blocks\.(\d+)\.(.+)", path)
    if match is None:
        return path
    return f"transformer_blocks.{match[1]}.{MMDIT_PARTS.get(match[2], match[2])}"


def to_mmdit(module: str) -> tuple[str, int | None]:
    """Returns the path in Stability's MMDiT, and the index in it if q, k and v are fused there.

    transformer_blocks.0.attn.to_k -> ("joint_blocks.0.x_block.attn.qkv", 1). An unknown path is
    returned unchanged.
    """
    match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module)
    if match is None:
        return module, None
    for fused, parts in MMDIT_FUSED.items():
        if match[2] in parts:
            return f"joint_blocks.{match[1]}.{fused}", parts.index(match[2])
    for stability, diffusers in MMDIT_PARTS.items():
        if diffusers == match[2]:
            return f"joint_blocks.{match[1]}.{stability}", None
    return module, None


QKV_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OPEN_CLIP = {"self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
CLIP_PREFIXES = {
    "text_encoder": (
        "cond_stage_model.transformer",
        "conditioner.embedders.0.transformer",
        "text_encoders.clip_l.transformer",
    ),
    "text_encoder_2": ("text_encoders.clip_g.transformer",),
}
OPEN_CLIP_PREFIXES = {
    "text_encoder": ("cond_stage_model.model",),
    "text_encoder_2": ("conditioner.embedders.1.model",),
}


def checkpoint_keys(component: str, module: str) -> list[tuple[str, int | None]]:
    """Returns the tensors of a single-file checkpoint that may contain the weight of a module.

    Each comes with an index if q, k and v are one tensor there, else with None.
    """
    if component == "unet":
        path = f"model.diffusion_model.{to_ldm(module)}.weight"
        # A block without attention has its upsampler at index 1.
        return [(path, None), (path.replace(".2.conv.", ".1.conv."), None)]
    if component == "transformer":
        path, index = to_mmdit(module)
        return [(f"model.diffusion_model.{path}.weight", index)]
    return _text_encoder_keys(component, module.removeprefix("text_model."))


def _text_encoder_keys(component: str, module: str) -> list[tuple[str, int | None]]:
    keys: list[tuple[str, int | None]] = []
    for prefix in CLIP_PREFIXES.get(component, ()):
        keys.append((f"{prefix}.text_model.{module}.weight", None))
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", module)
    if match is None:
        return keys
    for prefix in OPEN_CLIP_PREFIXES.get(component, ()):
        block = f"{prefix}.transformer.resblocks.{match[1]}"
        if match[2] in OPEN_CLIP:
            keys.append((f"{block}.{OPEN_CLIP[match[2]]}.weight", None))
        elif match[2] in QKV_PROJECTIONS:
            keys.append((f"{block}.attn.in_proj_weight", QKV_PROJECTIONS.index(match[2])))
    return keys

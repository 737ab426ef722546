"""Module paths in the checkpoints and code of Stability AI, and the same paths in diffusers."""

import re

RESNET_PARTS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


SINGLE_MODULES = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}


LAYERS_PER_BLOCK = 2  # of every UNet that Stability published


def from_ldm(path: str) -> str:
    """A path in Stability's own UNet as diffusers has it: input_blocks.4.1.proj_in -> down_blocks.1.attentions.0.proj_in. Others stay."""
    if path in SINGLE_MODULES:
        return SINGLE_MODULES[path]
    match = re.fullmatch(r"(input|middle|output)_blocks?\.(\d+)(?:\.(\d+))?(?:\.(.+))?", path)
    if match is None:
        return path
    side, number, part, inside = match[1], int(match[2]), match[3], match[4] or ""
    if side == "middle":  # middle_block.1.transformer_blocks.0...: the first number is the part
        inside = ".".join(filter(None, [part, inside]))
        place = {0: "mid_block.resnets.0", 1: "mid_block.attentions.0", 2: "mid_block.resnets.1"}[
            number
        ]
        return f"{place}.{RESNET_PARTS.get(inside, inside)}"
    block, layer = divmod(number - (side == "input"), LAYERS_PER_BLOCK + 1)
    name = "down_blocks" if side == "input" else "up_blocks"
    if inside == "op":
        return f"{name}.{block}.downsamplers.0.conv"
    if inside == "conv":
        return f"{name}.{block}.upsamplers.0.conv"
    if part == "0":
        return f"{name}.{block}.resnets.{layer}.{RESNET_PARTS.get(inside, inside)}"
    return f"{name}.{block}.attentions.{layer}.{inside}"


def to_ldm(module: str) -> str:
    """The other way: down_blocks.1.attentions.0.proj_in -> input_blocks.4.1.proj_in.

    There a block's layers and its resampling count on through the whole side, and 0 of the input side is the first convolution.
    """
    for ldm, diffusers in SINGLE_MODULES.items():
        if module == diffusers:
            return ldm
    match = re.fullmatch(
        r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)",
        module,
    )
    if match is None:
        raise ValueError(f"{module} has no place in Stability's UNet")
    side, block, what, layer, inside = (
        match[1],
        int(match[2] or 0),
        match[3],
        int(match[4]),
        match[5],
    )
    number = (LAYERS_PER_BLOCK + 1) * block + layer
    if what == "downsamplers":
        return f"input_blocks.{number + LAYERS_PER_BLOCK + 1}.0.op"
    if what == "upsamplers":
        return f"output_blocks.{number + LAYERS_PER_BLOCK}.2.{inside}"
    if what == "resnets":
        inside = next(
            (ldm for ldm, diffusers in RESNET_PARTS.items() if diffusers == inside), inside
        )
    part = {"resnets": 0, "attentions": 1}[what]
    if side == "mid_block":
        return f"middle_block.{1 if part else 2 * layer}.{inside}"
    return (
        f"input_blocks.{number + 1}.{part}.{inside}"
        if side == "down_blocks"
        else f"output_blocks.{number}.{part}.{inside}"
    )


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


def from_mmdit(path: str) -> str:
    """A path in Stability's own MMDiT as diffusers has it; the fused projections stay, to be split with their tensors. Others stay."""
    match = re.fullmatch(r"joint_blocks\.(\d+)\.(.+)", path)
    return f"transformer_blocks.{match[1]}.{MMDIT_PARTS.get(match[2], match[2])}" if match else path


def to_mmdit(module: str) -> tuple[str, int | None]:
    """The other way, and which third of it where three are fused there: ("joint_blocks.0.x_block.attn.qkv", 1) for to_k."""
    match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module)
    if match:
        for fused, parts in MMDIT_FUSED.items():
            if match[2] in parts:
                return f"joint_blocks.{match[1]}.{fused}", parts.index(match[2])
        for ours, diffusers in MMDIT_PARTS.items():
            if diffusers == match[2]:
                return f"joint_blocks.{match[1]}.{ours}", None
    return module, None


THIRDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


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


def checkpoint_places(component: str, module: str) -> list[tuple[str, int | None]]:
    """Tensors of a single-file checkpoint that may hold the weight of a module, with the third of it where q, k and v are one tensor."""
    if component == "unet":
        path = f"model.diffusion_model.{to_ldm(module)}.weight"
        return [(path, None), (path.replace(".2.conv.", ".1.conv."), None)]
    if component == "transformer":
        path, third = to_mmdit(module)
        return [(f"model.diffusion_model.{path}.weight", third)]
    bare = module.removeprefix("text_model.")
    places: list[tuple[str, int | None]] = [
        (f"{prefix}.text_model.{bare}.weight", None) for prefix in CLIP_PREFIXES.get(component, ())
    ]
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", bare)
    if match is None:
        return places
    for prefix in OPEN_CLIP_PREFIXES.get(component, ()):
        block, part = f"{prefix}.transformer.resblocks.{match[1]}", match[2]
        if part in OPEN_CLIP:
            places.append((f"{block}.{OPEN_CLIP[part]}.weight", None))
        elif part in THIRDS:
            places.append((f"{block}.attn.in_proj_weight", THIRDS.index(part)))
    return places

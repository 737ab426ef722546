"""From the name of a tensor in an adapter file, in any dialect, to the module it belongs to and its part in the adapter.

Modules are named as in diffusers, text encoders without the level `text_model`, which some have and some lost in transformers 5.6.
The other way, from module to key, differs by family: `ModelFamily.export_key`.
"""

import re
from dataclasses import dataclass

OPENERS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
DOTTED = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
UNET_TOPS = (
    "down_blocks",
    "mid_block",
    "up_blocks",
    "conv_in",
    "conv_out",
    "time_embedding",
    "add_embedding",
)

# A kohya key has underscores for the dots of the path; these words keep theirs.
COMPOUND = (  # the longer of two that begin alike stands first
    "transformer_blocks|timestep_embedder|adaLN_modulation|context_embedder|text_projection|"
    "skip_connection|time_text_embed|time_embedding|conv_shortcut|add_embedding|time_emb_proj|"
    "output_blocks|context_block|norm1_context|text_embedder|input_blocks|middle_block|joint_blocks|"
    "down_blocks|final_layer|text_model|emb_layers|out_layers|time_embed|x_embedder|t_embedder|y_embedder|"
    "add_q_proj|add_k_proj|add_v_proj|to_add_out|ff_context|mid_block|up_blocks|self_attn|in_layers|"
    "label_emb|pos_embed|conv_out|linear_1|linear_2|proj_out|out_proj|norm_out|conv_in|proj_in|x_block|"
    "to_out|q_proj|k_proj|v_proj|to_q|to_k|to_v"
)
WORD = re.compile(f"(?:{COMPOUND})(?=_|$)|[^_]+")

LEAF = re.compile(
    r"\.(?:(?P<kohya>lora_(?:down|up|mid)\.weight|alpha|scalar|dora_scale|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))"
    r"|lora_(?P<peft>[AB])(?:\.default)?\.weight"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
    r"|(?P<old>(?:processor\.)?to_[qkv]_lora|(?:processor\.)?to_out_lora|lora|lora_linear_layer)\.(?P<side>down|up)\.weight)$"
)


@dataclass(frozen=True)
class Place:
    component: str
    """"unet", "transformer", "text_encoder", ..."""
    module: str
    """Path inside the component."""
    leaf: str
    """Which tensor of the adapter, by its name in LyCORIS: "lora_down.weight", "alpha", "dora_scale", "hada_w1_a", ..."""
    dialect: str
    """"kohya", "diffusers", "old diffusers" or "peft"."""


def place_of(key: str) -> Place | None:
    """Where a tensor belongs; None for a key that is no adapter's. A path without a component is the UNet's, as in the oldest files."""
    found = LEAF.search(key)
    if found is None:
        return None
    path, leaf, dialect = key[: found.start()], found["kohya"], "kohya"
    if found["peft"]:
        leaf, dialect = {"A": "lora_down.weight", "B": "lora_up.weight"}[found["peft"]], "diffusers"
    elif found["magnitude"]:
        leaf, dialect = "dora_scale", "diffusers"
    elif found["old"]:
        leaf, dialect = f"lora_{found['side']}.weight", "old diffusers"
        path += _old_projection(found["old"], path)
    opener = next((opener for opener in OPENERS if path.startswith(opener)), None)
    if opener is not None:
        component, path = OPENERS[opener], ".".join(WORD.findall(path.removeprefix(opener)))
    elif path.startswith("base_model.model."):
        component, path, dialect = "", path.removeprefix("base_model.model."), "peft"
    else:
        component, _, rest = path.partition(".")
        component, path = (component, rest) if component in DOTTED else ("unet", path)
        if component == "unet" and not path.startswith(UNET_TOPS):
            return None
        if dialect == "kohya" and leaf != "alpha":
            dialect = "diffusers"
    return Place(*_as_in_diffusers(component, path), leaf, dialect)


def diffusers_key(component: str, module: str) -> str:
    """Where a module stands in a file for diffusers: ("transformer", "...to_q") -> "transformer...to_q"."""
    if component.startswith("text_encoder"):
        module = module.removeprefix("text_model.")
        if module != "text_projection":
            module = (
                f"text_model.{module}"  # the level that readers expect, whatever transformers has
            )
    return f"{component}.{module}"


def _old_projection(written: str, path: str) -> str:
    """What diffusers called its projections before PEFT: attn1.processor.to_out_lora is attn1.to_out.0, in a text encoder out_proj."""
    match = re.fullmatch(r"(?:processor\.)?to_(q|k|v|out)_lora", written)
    if match is None:
        return ""
    if "self_attn" in path:
        return f".{match[1]}_proj"
    return ".to_out.0" if match[1] == "out" else f".to_{match[1]}"


def _as_in_diffusers(component: str, path: str) -> tuple[str, str]:
    path = path.removeprefix("text_model.")
    if component.startswith("text_encoder"):
        return component, path
    if (
        path.startswith(("joint_blocks.", "context_embedder", "final_layer"))
        or component == "transformer"
    ):
        return "transformer", from_mmdit(path)
    return component, from_ldm(path)


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

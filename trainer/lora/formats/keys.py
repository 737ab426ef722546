"""From the name of a tensor in an adapter file, in any dialect, to the module it belongs to and its part in the adapter.

Modules are named as in diffusers, text encoders without the level `text_model`, which some have and some lost in transformers 5.6.
The other way, from module to key, differs by family: `ModelFamily.export_key`.
"""

import re
from dataclasses import dataclass

from trainer.lora.formats.stability_names import from_ldm, from_mmdit

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

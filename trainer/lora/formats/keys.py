"""From the key of a tensor in an adapter file, in any format, to its module and its role.

Modules have the names of diffusers. Text encoders have them without the level `text_model`: some
encoders have it, and others lost it in transformers 5.6. The other direction, from module to key,
depends on the model family: `ModelFamily.kohya_key`.
"""

import re
from dataclasses import dataclass

from trainer.lora.formats.stability_names import from_ldm, from_mmdit

KOHYA_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
"""The start of a kohya key and the component that it stands for."""

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
UNET_PREFIXES = (
    "down_blocks",
    "mid_block",
    "up_blocks",
    "conv_in",
    "conv_out",
    "time_embedding",
    "add_embedding",
)

# A kohya key has an underscore in place of each dot of the path. These words contain underscores
# themselves. If two words start alike, the longer one comes first.
WORDS_WITH_UNDERSCORES = (
    "transformer_blocks|timestep_embedder|adaLN_modulation|context_embedder|text_projection|"
    "skip_connection|time_text_embed|time_embedding|conv_shortcut|add_embedding|time_emb_proj|"
    "output_blocks|context_block|norm1_context|text_embedder|input_blocks|middle_block|"
    "joint_blocks|down_blocks|final_layer|text_model|emb_layers|out_layers|time_embed|x_embedder|"
    "t_embedder|y_embedder|add_q_proj|add_k_proj|add_v_proj|to_add_out|ff_context|mid_block|"
    "up_blocks|self_attn|in_layers|label_emb|pos_embed|conv_out|linear_1|linear_2|proj_out|"
    "out_proj|norm_out|conv_in|proj_in|x_block|to_out|q_proj|k_proj|v_proj|to_q|to_k|to_v"
)
WORD = re.compile(f"(?:{WORDS_WITH_UNDERSCORES})(?=_|$)|[^_]+")

TENSOR_NAME = re.compile(
    r"""\.(?:
    (?P<lycoris> lora_(?:down|up|mid)\.weight | alpha | scalar | dora_scale
        | hada_(?:w[12]_[ab]|t[12]) | lokr_(?:w[12](?:_[ab])?|t2) )
    | lora_(?P<peft>[AB])(?:\.default)?\.weight
    | (?P<magnitude>lora_magnitude_vector)(?:\.default)?(?:\.weight)?
    | (?P<old> (?:processor\.)?to_[qkv]_lora | (?:processor\.)?to_out_lora
        | lora | lora_linear_layer )\.(?P<side>down|up)\.weight
    )$""",
    re.VERBOSE,
)
"""The end of a key: the name of a tensor in LyCORIS, PEFT, or diffusers before PEFT."""


@dataclass(frozen=True)
class AdapterKey:
    """The parts of a key in an adapter file."""

    component: str
    """"unet", "transformer", "text_encoder", ..., or "" if the key does not contain it."""
    module: str
    """Path of the module inside the component."""
    leaf: str
    """Name of the tensor in LyCORIS: "lora_down.weight", "alpha", "dora_scale", ..."""
    file_format: str
    """"kohya", "diffusers", "old diffusers" or "peft"."""


def parse_key(key: str) -> AdapterKey | None:
    """Returns the parts of a key, or None if it is not the key of an adapter's tensor.

    A path without a component belongs to the UNet, as in the oldest files.
    """
    end = TENSOR_NAME.search(key)
    if end is None:
        return None
    path, leaf, file_format = key[: end.start()], end["lycoris"], "kohya"
    if end["peft"]:
        leaf = {"A": "lora_down.weight", "B": "lora_up.weight"}[end["peft"]]
        file_format = "diffusers"
    elif end["magnitude"]:
        leaf, file_format = "dora_scale", "diffusers"
    elif end["old"]:
        leaf, file_format = f"lora_{end['side']}.weight", "old diffusers"
        path += _old_projection(end["old"], path)

    # kohya's prefix, PEFT's prefix, or the component as the first word of the path.
    prefix = next((prefix for prefix in KOHYA_PREFIXES if path.startswith(prefix)), None)
    if prefix is not None:
        component = KOHYA_PREFIXES[prefix]
        path = ".".join(WORD.findall(path.removeprefix(prefix)))
    elif path.startswith("base_model.model."):
        component, path, file_format = "", path.removeprefix("base_model.model."), "peft"
    else:
        component, path = _split_component(path)
        if component == "unet" and not path.startswith(UNET_PREFIXES):
            return None
        if file_format == "kohya" and leaf != "alpha":
            file_format = "diffusers"
    return AdapterKey(*_diffusers_path(component, path), leaf, file_format)


def diffusers_key(component: str, module: str) -> str:
    """Returns the key of a module in diffusers' format: "transformer.<path>".

    Every reader expects the level `text_model` in a text encoder, in any version of transformers.
    """
    if component.startswith("text_encoder"):
        module = module.removeprefix("text_model.")
        if module != "text_projection":
            module = f"text_model.{module}"
    return f"{component}.{module}"


def _split_component(path: str) -> tuple[str, str]:
    component, _, rest = path.partition(".")
    return (component, rest) if component in COMPONENTS else ("unet", path)


def _old_projection(layer: str, path: str) -> str:
    """Returns the path that a layer name of diffusers before PEFT stands for.

    attn1.processor.to_out_lora is attn1.to_out.0, and in a text encoder out_proj.
    """
    match = re.fullmatch(r"(?:processor\.)?to_(q|k|v|out)_lora", layer)
    if match is None:
        return ""
    if "self_attn" in path:
        return f".{match[1]}_proj"
    return ".to_out.0" if match[1] == "out" else f".to_{match[1]}"


def _diffusers_path(component: str, path: str) -> tuple[str, str]:
    """Returns component and path in diffusers' names. Stability's MMDiT is a transformer there."""
    path = path.removeprefix("text_model.")
    if component.startswith("text_encoder"):
        return component, path
    is_mmdit = path.startswith(("joint_blocks.", "context_embedder", "final_layer"))
    if is_mmdit or component == "transformer":
        return "transformer", from_mmdit(path)
    return component, from_ldm(path)

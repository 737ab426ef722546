"""The keys of adapter files, for every layer of full-size models."""

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

from tests.bases import XL_UNET
from trainer import config
from trainer.families import FAMILIES
from trainer.lora import targets
from trainer.lora.formats.keys import parse_key
from trainer.models.safetensors_header import TensorInfo

SMALL_SD3 = {
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "dual_attention_layers": (0,),
}
SPELLINGS = ("lora_A.weight", "lora.down.weight", "lora_linear_layer.down.weight")
TRANSFORMER_ENDS = ("to_out.0", "to_add_out", "net.0.proj", "net.2")


def meta_model(family: str) -> nn.Module:
    with torch.device("meta"):
        if family == "sd35m":
            return SD3Transformer2DModel(**SMALL_SD3)
        if family == "sdxl":
            return UNet2DConditionModel(**XL_UNET)
        return UNet2DConditionModel(cross_attention_dim=768)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd35m"])
def test_every_layer_of_a_full_size_denoiser_is_found_by_its_kohya_key(name):
    """All linear layers and convolutions of a UNet, and the adapted ones of a transformer."""
    family = FAMILIES[name]
    layers = []
    for path, layer in meta_model(name).named_modules():
        is_adapted = family.denoiser_name == "unet" or path.endswith(TRANSFORMER_ENDS)
        if isinstance(layer, nn.Linear | nn.Conv2d) and is_adapted:
            layers.append(path)
    keys = {path: family.kohya_key(family.denoiser_name, path) for path in layers}
    assert len(set(keys.values())) == len(layers) > 10
    for path, key in keys.items():
        parsed = parse_key(f"{key}.lora_down.weight")
        assert (parsed.component, parsed.module) == (family.denoiser_name, path), key


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_layer_of_a_unet_is_found_by_its_diffusers_keys(name, spelling):
    for path, layer in meta_model(name).named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            parsed = parse_key(f"unet.{path}.{spelling}")
            assert (parsed.component, parsed.module) == ("unet", path)


BY_HAND = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "down_blocks.0.resnets.1.conv1": "input_blocks_2_0_in_layers_2",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
    "down_blocks.1.downsamplers.0.conv": "input_blocks_6_0_op",
    "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
    "mid_block.attentions.0.proj_in": "middle_block_1_proj_in",
    "up_blocks.1.attentions.2.proj_out": "output_blocks_5_1_proj_out",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    "up_blocks.2.resnets.2.conv2": "output_blocks_8_0_out_layers_3",
    "up_blocks.1.attentions.0.transformer_blocks.1.ff.net.0.proj": (
        "output_blocks_3_1_transformer_blocks_1_ff_net_0_proj"
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_stability_names_are_equal_to_a_list_written_by_hand(name):
    assert FAMILIES["sdxl"].kohya_key("unet", name) == f"lora_unet_{BY_HAND[name]}"
    assert parse_key(f"lora_unet_{BY_HAND[name]}.alpha").module == name


def test_the_upsampler_of_a_block_without_attention_is_found():
    key = parse_key("lora_unet_output_blocks_2_1_conv.alpha")
    assert key.module == "up_blocks.0.upsamplers.0.conv"


def test_a_middle_block_that_does_not_exist_keeps_its_name():
    key = parse_key("lora_unet_middle_block_7_proj_in.alpha")
    assert key.module == "middle_block.7.proj_in"


ATTENTION_PARTS = [
    f"{attention}_{part}"
    for attention in ("attn1", "attn2")
    for part in ("to_q", "to_k", "to_v", "to_out_0")
]
BLOCK_PARTS = [*ATTENTION_PARTS, "ff_net_0_proj", "ff_net_2"]


def attention_keys(attention: str, depth: int) -> list[str]:
    """Returns the keys below an attention: its projections, and the parts of each block."""
    blocks = [f"transformer_blocks_{n}_{part}" for n in range(depth) for part in BLOCK_PARTS]
    return [f"{attention}_{part}" for part in ("proj_in", "proj_out", *blocks)]


def resnet_keys(resnet: str, parts: tuple[str, ...]) -> list[str]:
    return [f"{resnet}_{part}" for part in parts]


def golden_sd1() -> list[str]:
    """From v1-inference.yaml, in diffusers' names.

    There is attention at the first three resolutions, and a shortcut wherever the widths differ.
    """
    plain = ("conv1", "time_emb_proj", "conv2")
    keys = [f"down_blocks_{block}_resnets_0_conv_shortcut" for block in (1, 2)]
    keys += resnet_keys("mid_block_resnets_0", plain) + resnet_keys("mid_block_resnets_1", plain)
    keys += attention_keys("mid_block_attentions_0", 1)
    for block in range(4):
        for layer in range(2):
            keys += resnet_keys(f"down_blocks_{block}_resnets_{layer}", plain)
        for layer in range(3):
            keys += resnet_keys(f"up_blocks_{block}_resnets_{layer}", (*plain, "conv_shortcut"))
    for block in range(3):
        keys += [f"down_blocks_{block}_downsamplers_0_conv", f"up_blocks_{block}_upsamplers_0_conv"]
        for layer in range(2):
            keys += attention_keys(f"down_blocks_{block}_attentions_{layer}", 1)
        for layer in range(3):
            keys += attention_keys(f"up_blocks_{block + 1}_attentions_{layer}", 1)
    return keys


def golden_sdxl() -> list[str]:
    """From sd_xl_base.yaml, in Stability's names.

    The attention has a depth of 2 at 640 channels, and of 10 at 1280.
    """
    inputs = [f"input_blocks_{n}_0" for n in (1, 2, 4, 5, 7, 8)]
    middle = ["middle_block_0", "middle_block_2"]
    outputs = [f"output_blocks_{n}_0" for n in range(9)]
    keys = []
    for resnet in inputs + middle + outputs:
        keys += resnet_keys(resnet, ("in_layers_2", "emb_layers_1", "out_layers_3"))
    for resnet in ("input_blocks_4_0", "input_blocks_7_0", *outputs):
        keys.append(f"{resnet}_skip_connection")
    keys += ["input_blocks_3_0_op", "input_blocks_6_0_op"]
    keys += ["output_blocks_2_2_conv", "output_blocks_5_2_conv"]
    for attention in ("input_blocks_4_1", "input_blocks_5_1"):
        keys += attention_keys(attention, 2)
    for attention in ("input_blocks_7_1", "input_blocks_8_1", "middle_block_1"):
        keys += attention_keys(attention, 10)
    for number in range(6):
        keys += attention_keys(f"output_blocks_{number}_1", 10 if number < 3 else 2)
    return keys


@pytest.mark.parametrize(
    ("family", "golden", "count"), [("sd1", golden_sd1(), 278), ("sdxl", golden_sdxl(), 788)]
)
def test_the_keys_of_a_full_size_unet_are_the_golden_list(family, golden, count):
    """Convolutions included, none missing and none unexpected."""
    tensors = {}
    for name, weight in meta_model(family).named_parameters():
        tensors[name] = TensorInfo("F16", tuple(weight.shape))
    adapter = config.Adapter(targets="linear+conv")
    chosen = targets.choose_targets(adapter, "unet", targets.projections(tensors))
    keys = [FAMILIES[family].kohya_key("unet", target.name) for target in chosen]
    assert len(keys) == len(set(keys)) == count
    assert set(keys) == {f"lora_unet_{key}" for key in golden}


TEXT_PARTS = {
    "self_attn.q_proj": (8, 8),
    "self_attn.k_proj": (8, 8),
    "self_attn.v_proj": (8, 8),
    "self_attn.out_proj": (8, 8),
    "mlp.fc1": (16, 8),
    "mlp.fc2": (8, 16),
}


@pytest.mark.parametrize("level", ["", "text_model."])
@pytest.mark.parametrize(
    ("family", "component", "prefix", "layers"),
    [
        ("sd1", "text_encoder", "lora_te", 12),
        ("sd2", "text_encoder", "lora_te", 23),
        ("sdxl", "text_encoder", "lora_te1", 12),
        ("sdxl", "text_encoder_2", "lora_te2", 32),
    ],
)
def test_the_keys_of_a_text_encoder_are_the_golden_list(family, component, prefix, layers, level):
    """The file has the level `text_model`, in every version of transformers."""
    shapes, golden = {}, set()
    for number in range(layers):
        for part, shape in TEXT_PARTS.items():
            shapes[f"{level}encoder.layers.{number}.{part}"] = shape
            key = f"text_model_encoder_layers_{number}_{part.replace('.', '_')}"
            golden.add(f"{prefix}_{key}")
    adapter = config.Adapter(text_encoder_targets="all")
    chosen = targets.choose_targets(adapter, component, shapes)
    keys = {FAMILIES[family].kohya_key(component, target.name) for target in chosen}
    assert keys == golden and len(golden) == layers * 6

"""Reads adapter files of every format, and refuses what it does not understand completely."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.lora.helpers import (
    QUERY,
    QUERY_KEY,
    TEXT,
    kohya_tensors,
    lora,
    only_module,
    peft_tensors,
    random_pair,
)
from trainer import config
from trainer.errors import ModelError
from trainer.families import FAMILIES, families_of_adapter
from trainer.inference.request import SampleRequest, StackedAdapter
from trainer.inference.samples import Sampler
from trainer.lora import writer
from trainer.lora.formats.reader import read_adapter

OLD_PROCESSOR = QUERY.replace(".to_q", ".processor.to_q_lora")
OLD_TEXT = TEXT.replace("out_proj", "to_out_lora")
OLD_KEYS = {
    f"unet.{QUERY}.lora.": ("unet", QUERY),
    f"{OLD_PROCESSOR}.": ("unet", QUERY),
    f"text_encoder.text_model.{OLD_TEXT}.": ("text_encoder", TEXT),
    f"text_encoder.text_model.{TEXT}.lora_linear_layer.": ("text_encoder", TEXT),
    "lora_unet_down_blocks_1_attentions_0_proj_in.lora_": (
        "unet",
        "down_blocks.1.attentions.0.proj_in",
    ),
    "lora_unet_input_blocks_4_1_proj_in.lora_": ("unet", "down_blocks.1.attentions.0.proj_in"),
}


@pytest.mark.parametrize("key", OLD_KEYS)
def test_old_files_are_read_with_a_note_about_the_missing_alpha(tmp_path, key):
    down, up = random_pair()
    path = tmp_path / "old.safetensors"
    save_file({f"{key}down.weight": down, f"{key}up.weight": up}, path)
    module = only_module(path)
    assert (module.component, module.name) == OLD_KEYS[key]
    torch.testing.assert_close(module.delta, up @ down)
    assert "alpha = rank is assumed" in read_adapter(path).notes[0]


def test_the_scale_is_read_from_the_alpha_of_a_kohya_file(tmp_path):
    save_file(kohya_tensors(*random_pair(), alpha=1.0), tmp_path / "k.safetensors")
    assert only_module(tmp_path / "k.safetensors").scale == 1.0 / 2


def test_the_scale_is_read_from_the_header_of_a_diffusers_file(tmp_path):
    down, up = random_pair()
    tensors = {f"unet.{QUERY}.lora_A.weight": down, f"unet.{QUERY}.lora_B.weight": up}
    header = {
        "unet.peft_type": "LORA",
        "unet.lora_alpha": 8,
        "unet.alpha_pattern": {QUERY: 3},
        "unet.use_rslora": True,
    }
    path = tmp_path / "d.safetensors"
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(header)})
    assert only_module(path).scale == pytest.approx(3 / 2**0.5)
    assert not read_adapter(path).notes


def test_the_scale_is_read_from_the_settings_of_a_peft_folder(tmp_path):
    save_file(peft_tensors(*random_pair()), tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 7}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    module = only_module(tmp_path)
    assert (module.component, module.name, module.scale) == ("unet", QUERY, 7 / 2)


def test_a_fused_projection_of_stability_is_split_into_q_k_and_v(tmp_path):
    """sd-scripts trains one A for all three."""
    down, up = random_pair(rank=2, outputs=48)
    key = "lora_unet_joint_blocks_1_x_block_attn_qkv"
    save_file(kohya_tensors(down, up, 1.0, key), tmp_path / "s.safetensors")
    modules = read_adapter(tmp_path / "s.safetensors").modules
    assert [m.name for m in modules] == [f"transformer_blocks.1.attn.to_{p}" for p in "qkv"]
    torch.testing.assert_close(torch.cat([m.delta for m in modules]), 0.5 * up @ down)


def test_separate_projections_are_fused_and_split_again(tmp_path):
    """Each has its own rank, and one of the three is missing."""

    def module(name, rank, scale):
        path = f"transformer_blocks.2.attn.{name}"
        return lora(path, *random_pair(rank, seed=rank), scale, component="transformer")

    modules = [module("to_q", 2, 0.5), module("to_v", 3, 2.0), module("add_k_proj", 1, 1.0)]
    path = tmp_path / "k.safetensors"
    writer.save_adapter(path, "kohya", modules, FAMILIES["sd35m"], torch.float32, {})
    assert {name.partition(".")[0] for name in load_file(path)} == {
        "lora_unet_joint_blocks_2_x_block_attn_qkv",
        "lora_unet_joint_blocks_2_context_block_attn_qkv",
    }
    saved = {m.name.rpartition(".")[2]: m for m in writer.verify(path, modules).modules}
    for expected in modules:
        torch.testing.assert_close(saved[expected.name.rpartition(".")[2]].delta, expected.delta)
    assert not saved["to_k"].delta.any() and saved["to_v"].rank == 3


VALID = kohya_tensors(*random_pair())
INVALID = {
    "a B of another rank": ({f"{QUERY_KEY}.lora_up.weight": torch.ones(16, 5)}, "fit together"),
    "not a number": (
        {f"{QUERY_KEY}.lora_up.weight": torch.full((16, 2), float("nan"))},
        "not finite",
    ),
    "infinite": ({f"{QUERY_KEY}.lora_up.weight": torch.full((16, 2), float("inf"))}, "not finite"),
    "three alphas": ({f"{QUERY_KEY}.alpha": torch.ones(3)}, "3 numbers"),
    "another kind": ({f"{QUERY_KEY}.oft_diag": torch.ones(3)}, "a kind that is not supported"),
    "two spellings": ({f"unet.{QUERY}.lora_A.weight": torch.ones(2, 16)}, "twice"),
    "no pair": ({"lora_unet_conv_in.alpha": torch.ones(())}, "no low-rank pair"),
    "a wrong dora_scale": ({f"{QUERY_KEY}.dora_scale": torch.ones(7, 1)}, "do not fit together"),
    "integers": (
        {f"{QUERY_KEY}.lora_up.weight": torch.ones(16, 2, dtype=torch.int32)},
        "whole numbers",
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_a_file_that_is_not_understood_completely_is_refused(tmp_path, case):
    tensors, message = INVALID[case]
    save_file(VALID | tensors, tmp_path / "bad.safetensors")
    with pytest.raises(ModelError, match=message) as error:
        read_adapter(tmp_path / "bad.safetensors")
    assert "bad.safetensors" in str(error.value) and str(error.value).endswith(".")


def test_a_file_without_an_adapter_is_refused(tmp_path, tiny_base):
    save_file({"vae.conv.weight": torch.ones(2)}, tmp_path / "vae.safetensors")
    for path in (
        tmp_path / "vae.safetensors",
        tiny_base / "vae" / "diffusion_pytorch_model.safetensors",
    ):
        with pytest.raises(ModelError, match="is not a LoRA"):
            read_adapter(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("not json", "not valid JSON"),
        ('{"peft_type": "VERA"}', "the kind VERA"),
        ('{"peft_type": ["LORA"]}', "not supported"),
        ('{"peft_type": "LORA", "lora_alpha": "8"}', "not a number"),
        (
            '{"peft_type": "LORA", "lora_alpha": 8, "alpha_pattern": {"(a+)+": 1}}',
            "regular expression",
        ),
        ("[" * 100_000, "not valid JSON"),
        (" " * 2**21, "larger than"),
    ],
)
def test_a_hostile_peft_folder_is_refused(tmp_path, settings, message):
    save_file(peft_tensors(*random_pair()), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(settings)
    with pytest.raises(ModelError, match=message):
        read_adapter(tmp_path)


def test_a_peft_folder_with_a_pickle_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="can run code"):
        read_adapter(tmp_path)


XL_KEY = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"


def test_an_adapter_of_another_family_is_refused_with_both_names(base_of, tmp_path):
    path = tmp_path / "xl.safetensors"
    save_file(kohya_tensors(*random_pair(inputs=2048), 2.0, XL_KEY), path)
    assert families_of_adapter(read_adapter(path)) == ["Stable Diffusion XL"]
    base = config.Base(model=str(base_of("sd1")))
    target = str(tmp_path / "x.png")
    request = SampleRequest("x", target, base, [StackedAdapter(str(path))])
    message = (
        "xl.safetensors is an adapter for Stable Diffusion XL, and the base model .* is a "
        "Stable Diffusion 1.x"
    )
    with pytest.raises(ModelError, match=message):
        Sampler().render(request)


def test_an_unsupported_family_is_read_from_the_metadata(tmp_path):
    path = tmp_path / "f.safetensors"
    save_file(kohya_tensors(*random_pair(), key=XL_KEY), path, {"ss_base_model_version": "flux1"})
    assert families_of_adapter(read_adapter(path)) == ["flux1"]


SD3_NAMES = [
    family.name for family in FAMILIES.values() if family.name.startswith("Stable Diffusion 3")
]
SD3_MODULE = "transformer.transformer_blocks.0.attn.to_q"
UNET_MODULE = "unet.mid_block.attentions.0.proj_in"
ATTENTION = "text_model.encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("modules", "families"),
    [
        ([SD3_MODULE], SD3_NAMES),
        ([SD3_MODULE, "transformer.single_transformer_blocks.0.attn.to_q"], []),
        ([UNET_MODULE, f"text_encoder_2.{ATTENTION}"], ["Stable Diffusion XL"]),
        ([UNET_MODULE, f"text_encoder.{ATTENTION}"], []),
    ],
    ids=["sd3", "flux", "sdxl", "either"],
)
def test_the_family_of_a_file_without_metadata_is_found_by_its_modules(tmp_path, modules, families):
    down, up = random_pair()
    tensors = {}
    for module in modules:
        tensors[f"{module}.lora_A.weight"] = down.clone()
        tensors[f"{module}.lora_B.weight"] = up.clone()
    save_file(tensors, tmp_path / "a.safetensors")
    assert families_of_adapter(read_adapter(tmp_path / "a.safetensors")) == families

"""Adapter files of every dialect and kind: the names of full-size models, the exact effect in a fresh base, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from tests.families.test_families import XL_UNET, base_of, load, predict  # noqa: F401 (fixtures)
from trainer import config
from trainer.errors import ConfigError, ModelError
from trainer.families import FAMILIES, families_of_adapter
from trainer.inference.samples import Sampler, SampleRequest, StackedAdapter
from trainer.lora import export, inject, targets, writer
from trainer.lora.apply import Stack, WeightedAdapter
from trainer.lora.formats.adapted_module import AdaptedModule
from trainer.lora.formats.keys import parse_key
from trainer.lora.formats.reader import read_adapter
from trainer.lora.metadata import shared_config
from trainer.models.safetensors_header import TensorInfo
from trainer.runs import events, run_folder, run_status
from trainer.training import setup

NAMES = [family.name for family in FAMILIES.values()]
SD3 = {
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "dual_attention_layers": (0,),
}


def meta_model(family):
    with torch.device("meta"):
        if family == "sd35m":
            return SD3Transformer2DModel(**SD3)
        return (
            UNet2DConditionModel(**XL_UNET)
            if family == "sdxl"
            else UNet2DConditionModel(cross_attention_dim=768)
        )


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd35m"])
def test_every_layer_of_a_full_size_denoiser_is_found_again_by_its_key(family):
    """All linear layers and convolutions, by kohya's key; of a transformer those that adapters are trained on."""
    family = FAMILIES[family]
    layers = [
        name
        for name, layer in meta_model(family_key(family)).named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    if family.denoiser_name == "transformer":
        layers = [
            n for n in layers if n.endswith(("to_out.0", "to_add_out", "net.0.proj", "net.2"))
        ]
    keys = {name: family.kohya_key(family.denoiser_name, name) for name in layers}
    assert len(set(keys.values())) == len(layers) > 10
    for name, key in keys.items():
        place = parse_key(f"{key}.lora_down.weight")
        assert (place.component, place.module) == (family.denoiser_name, name), key
    if family.denoiser_name == "unet":
        for name in layers:  # and by the names that diffusers has, in each of its spellings
            for spelling in ("lora_A.weight", "lora.down.weight", "lora_linear_layer.down.weight"):
                assert parse_key(f"unet.{name}.{spelling}").module == name


def family_key(family):
    return next(key for key, other in FAMILIES.items() if other is family)


def test_stabilitys_names_are_those_of_the_table():
    """Some of each row, written by hand."""
    by_hand = {
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
        "up_blocks.1.attentions.0.transformer_blocks.1.ff.net.0.proj": "output_blocks_3_1_transformer_blocks_1_ff_net_0_proj",
    }
    assert {name: FAMILIES["sdxl"].kohya_key("unet", name) for name in by_hand} == {
        n: f"lora_unet_{k}" for n, k in by_hand.items()
    }
    assert (
        parse_key("lora_unet_output_blocks_2_1_conv.alpha").module == "up_blocks.0.upsamplers.0.conv"
    )  # a block without attention


ATTENTIONS = [
    f"{attention}_{part}"
    for attention in ("attn1", "attn2")
    for part in ("to_q", "to_k", "to_v", "to_out_0")
]


def transformer(depth):
    """Below an attention: its projections in and out, and so many blocks."""
    inner = [
        f"transformer_blocks_{n}_{part}"
        for n in range(depth)
        for part in (*ATTENTIONS, "ff_net_0_proj", "ff_net_2")
    ]
    return ["proj_in", "proj_out", *inner]


def golden_sd1():
    """From v1-inference.yaml, in diffusers' names: attention where the picture is halved at most twice; a shortcut where widths differ."""
    plain = ("conv1", "time_emb_proj", "conv2")
    keys = [
        f"down_blocks_{b}_resnets_{j}_{part}" for b in range(4) for j in range(2) for part in plain
    ]
    keys += [f"mid_block_resnets_{j}_{part}" for j in range(2) for part in plain]
    keys += [
        f"up_blocks_{b}_resnets_{j}_{part}"
        for b in range(4)
        for j in range(3)
        for part in (*plain, "conv_shortcut")
    ]
    keys += [f"down_blocks_{b}_resnets_0_conv_shortcut" for b in (1, 2)]
    keys += [f"down_blocks_{b}_downsamplers_0_conv" for b in range(3)] + [
        f"up_blocks_{b}_upsamplers_0_conv" for b in range(3)
    ]
    places = [f"down_blocks_{b}_attentions_{j}" for b in range(3) for j in range(2)] + [
        "mid_block_attentions_0"
    ]
    places += [f"up_blocks_{b}_attentions_{j}" for b in (1, 2, 3) for j in range(3)]
    return keys + [f"{place}_{part}" for place in places for part in transformer(1)]


def golden_sdxl():
    """From sd_xl_base.yaml, in Stability's names: attention of depth 2 at 640 channels, 10 at 1280."""
    resnets = [f"input_blocks_{n}_0" for n in (1, 2, 4, 5, 7, 8)] + [
        "middle_block_0",
        "middle_block_2",
    ]
    outputs = [f"output_blocks_{n}_0" for n in range(9)]
    keys = [
        f"{place}_{part}"
        for place in resnets + outputs
        for part in ("in_layers_2", "emb_layers_1", "out_layers_3")
    ]
    keys += [
        f"{place}_skip_connection" for place in ("input_blocks_4_0", "input_blocks_7_0", *outputs)
    ]
    keys += [
        "input_blocks_3_0_op",
        "input_blocks_6_0_op",
        "output_blocks_2_2_conv",
        "output_blocks_5_2_conv",
    ]
    shallow = ["input_blocks_4_1", "input_blocks_5_1", *(f"output_blocks_{n}_1" for n in (3, 4, 5))]
    deep = [
        "input_blocks_7_1",
        "input_blocks_8_1",
        "middle_block_1",
        *(f"output_blocks_{n}_1" for n in (0, 1, 2)),
    ]
    return keys + [
        f"{place}_{part}"
        for places, depth in ((shallow, 2), (deep, 10))
        for place in places
        for part in transformer(depth)
    ]


@pytest.mark.parametrize(
    "family, golden, count", [("sd1", golden_sd1(), 278), ("sdxl", golden_sdxl(), 788)]
)
def test_the_keys_of_all_layers_of_a_full_size_unet_are_the_golden_list(family, golden, count):
    """Convolutions among them: none missing, none unexpected."""
    tensors = {
        name: TensorInfo("F16", tuple(weight.shape))
        for name, weight in meta_model(family).named_parameters()
    }
    chosen = targets.choose_targets(
        config.Adapter(targets="linear+conv"), "unet", targets.projections(tensors)
    )
    keys = [FAMILIES[family].kohya_key("unet", target.name) for target in chosen]
    assert len(keys) == len(set(keys)) == count and set(keys) == {
        f"lora_unet_{key}" for key in golden
    }


@pytest.mark.parametrize("family, component, front, layers", [
    ("sd1", "text_encoder", "lora_te", 12), ("sd2", "text_encoder", "lora_te", 23),
    ("sdxl", "text_encoder", "lora_te1", 12), ("sdxl", "text_encoder_2", "lora_te2", 32),
])  # fmt: skip
@pytest.mark.parametrize("level", ["", "text_model."])
def test_the_keys_of_all_layers_of_a_text_encoder_are_the_golden_list(
    family, component, front, layers, level
):
    """Whether this version of transformers has the level `text_model` or not, the file has it."""
    parts = {f"self_attn.{part}": (8, 8) for part in ("q_proj", "k_proj", "v_proj", "out_proj")} | {
        "mlp.fc1": (16, 8),
        "mlp.fc2": (8, 16),
    }
    shapes = {
        f"{level}encoder.layers.{n}.{part}": shape
        for n in range(layers)
        for part, shape in parts.items()
    }
    chosen = targets.choose_targets(config.Adapter(text_encoder_targets="all"), component, shapes)
    golden = {
        f"{front}_text_model_encoder_layers_{n}_{part.replace('.', '_')}"
        for n in range(layers)
        for part in parts
    }
    assert {
        FAMILIES[family].kohya_key(component, target.name) for target in chosen
    } == golden and len(golden) == layers * 6


KINDS = {
    "lora": {"rank": 3, "alpha": 5.0},
    "rslora": {"kind": "rslora", "rank": 4, "alpha": 6.0},
    "varying": {
        "rank": 3,
        "alpha": 5.0,
        "targets": "linear+conv",
        "conv_rank": 2,
        "ranks": "mid_block=5, attn2=1",
        "alphas": "mid_block=2",
    },
    "dora": {"kind": "dora", "rank": 2, "alpha": 3.0, "targets": "linear+conv"},
    "loha": {"kind": "loha", "rank": 2, "alpha": 3.0, "targets": "linear+conv"},
    "lokr": {"kind": "lokr", "rank": 2, "alpha": 3.0, "targets": "linear+conv", "lokr_factor": 4},
}
CASES = [("sd1", kind) for kind in ("rslora", "varying", "dora", "loha", "lokr")] + [
    ("sdxl", "varying"),
    ("sdxl", "rslora"),
    ("sd3", "lora"),
]


def trained(base, kind):
    """A base with a random adapter everywhere, as if trained; what it predicts, and its records."""
    draw = torch.Generator().manual_seed(3)
    parts = {
        base.family.denoiser_name: base.denoiser,
        **base.family.trainable_text_encoders(base.pipe),
    }
    for name, part in parts.items():
        inject.inject(part, name, config.Adapter(**KINDS[kind]), seed=1)
        for key, parameter in inject.trainable(part).items():
            if "magnitude" in key:
                parameter.data *= 1 + 0.1 * torch.rand(parameter.shape, generator=draw)
            else:
                nn.init.normal_(parameter, std=0.15, generator=draw)
    return predict(base.family, base.pipe), list(inject.adapted_modules(parts))


@pytest.mark.parametrize("family, kind", CASES)
def test_a_file_does_in_a_fresh_base_what_was_trained(load, tmp_path, family, kind):  # noqa: F811
    """Every kind in every dialect that has a form for it, laid on by our reader; and by diffusers where it reads the kind."""
    base = load(family)
    plain = predict(base.family, base.pipe)
    wanted, modules = trained(base, kind)
    assert (wanted - plain).norm() > 0.02 * plain.norm()
    whole = {"loha": ("kohya", "peft"), "lokr": ("kohya",)}.get(
        kind, ("kohya", "diffusers", "peft")
    )
    fresh = load(family)
    stack = Stack(fresh)
    for dialect in whole:
        path = tmp_path / (dialect if dialect == "peft" else f"{dialect}.safetensors")
        writer.save_adapter(path, dialect, modules, base.family, torch.float32, {})
        file = writer.verify(path, modules)
        assert file.file_format == dialect and (file.notes == []) == (dialect != "diffusers")
        stack.apply([WeightedAdapter(file, 1.0, 1.0)])
        torch.testing.assert_close(predict(fresh.family, fresh.pipe), wanted, rtol=0, atol=1e-5)
        stack.clear()
        assert torch.equal(predict(fresh.family, fresh.pipe), plain)
        if dialect == "kohya":
            alphas = {
                float(tensor) for name, tensor in load_file(path).items() if name.endswith(".alpha")
            }
            assert len(alphas) == 1, "some readers look at one alpha only"
    for dialect in {"kohya", "diffusers", "peft"} - set(whole):
        with pytest.raises(ModelError, match="kohya"):
            writer.save_adapter(tmp_path / "no", dialect, modules, base.family, torch.float32, {})
    # It leaves out kohya's dora_scale, and knows no kohya names for Stable Diffusion 3.
    read = {"loha": (), "lokr": (), "dora": ("diffusers",)}.get(kind, ("kohya", "diffusers"))
    for dialect in read if family != "sd3" else ("diffusers",):
        other = load(family)
        other.pipe.load_lora_weights(str(tmp_path / f"{dialect}.safetensors"))
        torch.testing.assert_close(predict(other.family, other.pipe), wanted, rtol=0, atol=1e-5)
    if (family, kind) in (("sd1", "varying"), ("sdxl", "rslora"), ("sd1", "loha")):
        other = load(family)
        for part in (tmp_path / "peft").iterdir():
            PeftModel.from_pretrained(getattr(other.pipe, part.name), part)
        torch.testing.assert_close(predict(other.family, other.pipe), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_half_precision_is_within_its_rounding(load, tmp_path, precision):  # noqa: F811
    base = load("sd1")
    _, modules = trained(base, "dora")
    writer.save_adapter(tmp_path / "a.safetensors", "kohya", modules, base.family, precision, {})
    assert read_adapter(tmp_path / "a.safetensors").dtype == str(precision).removeprefix("torch.")
    writer.verify(tmp_path / "a.safetensors", modules)


def pair(rank=2, outputs=16, inputs=16, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rank, inputs, generator=draw), torch.randn(outputs, rank, generator=draw)


QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "encoder.layers.1.self_attn.out_proj"


def only(path):
    (module,) = read_adapter(path).modules
    return module


PROCESSOR, TO_OUT = (
    QUERY.replace(".to_q", ".processor.to_q_lora"),
    TEXT.replace("out_proj", "to_out_lora"),
)
OLD = {
    f"unet.{QUERY}.lora.": ("unet", QUERY),
    f"{PROCESSOR}.": ("unet", QUERY),
    f"text_encoder.text_model.{TO_OUT}.": ("text_encoder", TEXT),
    f"text_encoder.text_model.{TEXT}.lora_linear_layer.": ("text_encoder", TEXT),
    "lora_unet_down_blocks_1_attentions_0_proj_in.lora_": (
        "unet",
        "down_blocks.1.attentions.0.proj_in",
    ),
    "lora_unet_input_blocks_4_1_proj_in.lora_": ("unet", "down_blocks.1.attentions.0.proj_in"),
}


@pytest.mark.parametrize("key", OLD)
def test_files_of_before_are_read_and_a_missing_alpha_is_said(tmp_path, key):
    a, b = pair()
    save_file({f"{key}down.weight": a, f"{key}up.weight": b}, tmp_path / "old.safetensors")
    module = only(tmp_path / "old.safetensors")
    assert (module.component, module.name) == OLD[key]
    torch.testing.assert_close(module.delta, b @ a)
    assert "alpha = rank is assumed" in read_adapter(tmp_path / "old.safetensors").notes[0]


def test_the_scale_is_taken_from_where_it_stands(tmp_path):
    a, b = pair()
    names = {f"unet.{QUERY}.lora_A.weight": a, f"unet.{QUERY}.lora_B.weight": b}
    header = {
        "unet.peft_type": "LORA",
        "unet.lora_alpha": 8,
        "unet.alpha_pattern": {QUERY: 3},
        "unet.use_rslora": True,
    }
    save_file(names, tmp_path / "d.safetensors", {"lora_adapter_metadata": json.dumps(header)})
    assert (
        only(tmp_path / "d.safetensors").scale == pytest.approx(3 / 2**0.5)
        and not read_adapter(tmp_path / "d.safetensors").notes
    )
    folder = tmp_path / "peft"
    folder.mkdir()
    save_file(
        {
            f"base_model.model.{QUERY}.lora_A.weight": a,
            f"base_model.model.{QUERY}.lora_B.weight": b,
        },
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 7})
    )
    module = only(folder)
    assert (module.component, module.name, module.scale) == ("unet", QUERY, 3.5)
    key = f"lora_unet_{QUERY.replace('.', '_')}"
    save_file(
        {
            f"{key}.lora_down.weight": a,
            f"{key}.lora_up.weight": b,
            f"{key}.alpha": torch.tensor(1.0),
        },
        tmp_path / "k.safetensors",
    )
    assert only(tmp_path / "k.safetensors").scale == 0.5


def test_stabilitys_fused_projections_are_split_and_put_together(tmp_path):
    """One A for q, k and v as sd-scripts trains it; and our own three, of ranks of their own, one of them missing."""
    a, b = pair(rank=2, outputs=48)
    key = "lora_unet_joint_blocks_1_x_block_attn_qkv"
    save_file(
        {
            f"{key}.lora_down.weight": a,
            f"{key}.lora_up.weight": b,
            f"{key}.alpha": torch.tensor(1.0),
        },
        tmp_path / "s.safetensors",
    )
    found = read_adapter(tmp_path / "s.safetensors").modules
    assert [m.name for m in found] == [f"transformer_blocks.1.attn.to_{p}" for p in "qkv"]
    torch.testing.assert_close(torch.cat([m.delta for m in found]), 0.5 * b @ a)

    def module(name, rank, scale):
        down, up = pair(rank, seed=rank)
        return AdaptedModule(
            "transformer",
            f"transformer_blocks.2.attn.{name}",
            "lora",
            {"lora_down.weight": down, "lora_up.weight": up},
            scale,
        )

    modules = [module("to_q", 2, 0.5), module("to_v", 3, 2.0), module("add_k_proj", 1, 1.0)]
    writer.save_adapter(
        tmp_path / "k.safetensors", "kohya", modules, FAMILIES["sd35m"], torch.float32, {}
    )
    file = writer.verify(tmp_path / "k.safetensors", modules)
    assert {name.partition(".")[0] for name in load_file(tmp_path / "k.safetensors")} == {
        "lora_unet_joint_blocks_2_x_block_attn_qkv",
        "lora_unet_joint_blocks_2_context_block_attn_qkv",
    }
    found = {m.name.rpartition(".")[2]: m for m in file.modules}
    for wanted in modules:
        torch.testing.assert_close(found[wanted.name.rpartition(".")[2]].delta, wanted.delta)
    assert not found["to_k"].delta.any() and found["to_v"].rank == 3


@pytest.mark.parametrize("family, component", [("sd2", "text_encoder"), ("sdxl", "text_encoder_2")])
def test_an_open_clip_attention_is_never_alone(tmp_path, family, component):
    a, b = pair(outputs=32, inputs=32)
    module = AdaptedModule(
        component,
        "encoder.layers.1.self_attn.q_proj",
        "lora",
        {"lora_down.weight": a, "lora_up.weight": b},
        1.0,
    )
    tensors = export.to_kohya([module], FAMILIES[family], torch.float32)
    ups = {
        name.removesuffix(".lora_up.weight").rpartition("attn_")[2]: t
        for name, t in tensors.items()
        if name.endswith("lora_up.weight")
    }
    assert (
        ups.keys() == {"q_proj", "k_proj", "v_proj", "out_proj"}
        and [bool(t.any()) for t in ups.values()].count(True) == 1
    )
    assert (
        len(
            export.to_kohya(
                [replace(module, component="text_encoder")], FAMILIES["sd1"], torch.float32
            )
        )
        == 3
    )


def spoiled(**tensors):
    a, b = pair()
    key = f"lora_unet_{QUERY.replace('.', '_')}"
    return {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b} | {
        name.replace("KEY", key): tensor for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(
    "tensors, words",
    [
        (spoiled(**{"KEY.lora_up.weight": torch.ones(16, 5)}), "do not fit together"),
        (spoiled(**{"KEY.lora_up.weight": torch.full((16, 2), float("nan"))}), "not finite"),
        (spoiled(**{"KEY.alpha": torch.ones(3)}), "3 numbers"),
        (spoiled(**{"KEY.oft_diag": torch.ones(3)}), "of a kind that is not supported"),
        (spoiled(**{f"unet.{QUERY}.lora_A.weight": torch.ones(2, 16)}), "twice"),
        (spoiled(**{"lora_unet_conv_in.alpha": torch.ones(())}), "no low-rank pair"),
        (spoiled(**{"KEY.dora_scale": torch.ones(7, 1)}), "do not fit together"),
        (spoiled(**{"KEY.lora_up.weight": torch.ones(16, 2, dtype=torch.int32)}), "whole numbers"),
        ({"vae.conv.weight": torch.ones(2)}, "is not a LoRA"),
    ],
)
def test_what_cannot_be_understood_whole_is_refused(tmp_path, tensors, words):
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(ModelError, match=words) as error:
        read_adapter(tmp_path / "bad.safetensors")
    assert "bad.safetensors" in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize(
    "settings, words",
    [
        ("not json", "not valid JSON"),
        ('{"peft_type": "VERA"}', "the kind VERA"),
        ('{"peft_type": "LORA", "lora_alpha": "8"}', "not a number"),
        (
            '{"peft_type": "LORA", "lora_alpha": 8, "alpha_pattern": {"(a+)+": 1}}',
            "regular expression",
        ),
        ("[" * 100_000, "not valid JSON"),
        (" " * 2**21, "larger than"),
    ],
)
def test_a_hostile_peft_folder_is_refused(tmp_path, settings, words):
    a, b = pair()
    save_file(
        {
            f"base_model.model.{QUERY}.lora_A.weight": a,
            f"base_model.model.{QUERY}.lora_B.weight": b,
        },
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(settings)
    with pytest.raises(ModelError, match=words):
        read_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ModelError, match="can run code"):
        read_adapter(tmp_path)


def test_an_adapter_of_another_family_is_refused_naming_both(base_of, tmp_path):  # noqa: F811
    a, b = pair(inputs=2048)
    key = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    save_file(
        {
            f"{key}.lora_down.weight": a,
            f"{key}.lora_up.weight": b,
            f"{key}.alpha": torch.tensor(2.0),
        },
        tmp_path / "xl.safetensors",
    )
    assert families_of_adapter(read_adapter(tmp_path / "xl.safetensors")) == ["Stable Diffusion XL"]
    request = SampleRequest(
        "x",
        str(tmp_path / "x.png"),
        config.Base(model=str(base_of("sd1"))),
        [StackedAdapter(str(tmp_path / "xl.safetensors"))],
    )
    with pytest.raises(
        ModelError,
        match=r"xl.safetensors is an adapter for Stable Diffusion XL, and the base model .* is a Stable Diffusion 1.x",
    ):
        Sampler().render(request)
    save_file(
        {f"{key}.lora_down.weight": pair()[0], f"{key}.lora_up.weight": b},
        tmp_path / "f.safetensors",
        {"ss_base_model_version": "flux1"},
    )
    assert families_of_adapter(read_adapter(tmp_path / "f.safetensors")) == ["flux1"]


@pytest.mark.parametrize(
    "modules, families",
    [
        (
            ["transformer.transformer_blocks.0.attn.to_q"],
            [name for name in NAMES if name.startswith("Stable Diffusion 3")],
        ),
        (
            [
                "transformer.transformer_blocks.0.attn.to_q",
                "transformer.single_transformer_blocks.0.attn.to_q",
            ],
            [],
        ),
        (
            [
                "unet.mid_block.attentions.0.proj_in",
                "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj",
            ],
            ["Stable Diffusion XL"],
        ),
        (
            [
                "unet.mid_block.attentions.0.proj_in",
                "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
            ],
            [],
        ),
    ],
    ids=["sd3", "flux", "sdxl", "either"],
)
def test_an_adapter_without_a_word_is_told_by_what_it_changes(tmp_path, modules, families):
    a, b = pair()
    tensors = {
        f"{module}.{end}.weight": tensor.clone()
        for module in modules
        for end, tensor in (("lora_A", a), ("lora_B", b))
    }
    save_file(tensors, tmp_path / "a.safetensors")
    assert families_of_adapter(read_adapter(tmp_path / "a.safetensors")) == families


def test_adapters_stack_each_at_its_strength_and_text_apart(load, tmp_path):  # noqa: F811
    """Against weights merged by hand; strength 0 is the base to the bit."""
    base = load("sd1")
    files = []
    for number, kind in enumerate(("varying", "dora")):
        other = load("sd1")
        _, modules = trained(other, kind)
        path = tmp_path / f"{number}.safetensors"
        writer.save_adapter(path, "kohya", modules, other.family, torch.float32, {})
        files.append(read_adapter(path))
    plain = predict(base.family, base.pipe)
    merged = load("sd1")
    strengths = [(0.7, -0.3), (0.0, 1.4)]
    originals = {
        name: {k: v.clone() for k, v in part.state_dict().items()}
        for name, part in merged.components.items()
    }
    for file, (denoiser, text) in zip(files, strengths, strict=True):
        for module in file.modules:
            layer = merged.components[module.component].get_submodule(module.name)
            weight = originals[module.component][f"{module.name}.weight"]
            layer.weight.data += (
                text if module.component == "text_encoder" else denoiser
            ) * module.change(weight)
    stack = Stack(base)
    stack.apply([WeightedAdapter(file, *both) for file, both in zip(files, strengths, strict=True)])
    torch.testing.assert_close(
        predict(base.family, base.pipe), predict(merged.family, merged.pipe), rtol=0, atol=2e-5
    )
    stack.apply([WeightedAdapter(file, 0.0, 0.0) for file in files])
    assert torch.equal(predict(base.family, base.pipe), plain)


def test_a_run_writes_each_dialect_it_is_told_to(train_tiny):
    folder = train_tiny(
        {
            "saving.dialects": ["diffusers", "peft", "kohya"],
            "training.steps": 2,
            "saving.saves": 1,
            "saving.precision": "fp32",
        }
    )
    main = run_status.read_status(folder).finished.file
    files = [read_adapter(folder / name) for name in (main, "tiny-kohya.safetensors", "tiny-peft")]
    assert [file.file_format for file in files] == ["diffusers", "kohya", "peft"]
    by_name = [{m.name: m.delta for m in file.modules} for file in files]
    for other in by_name[1:]:
        torch.testing.assert_close(other, by_name[0])
    with pytest.raises(ConfigError, match="peft alone"):
        config.replace(config.RunConfig(), {"saving.dialects": ["peft"]})


@pytest.mark.parametrize("kind", ["varying", "dora", "lokr"])
def test_training_goes_on_from_a_file(base_of, tiny_run, load, tmp_path, monkeypatch, kind):  # noqa: F811
    """What it does at step 0 is what the file did, whatever its ranks and alphas; what the settings cannot go on with is a sentence."""
    wanted, modules = trained(load("sd1"), kind)
    path = tmp_path / "first.safetensors"
    writer.save_adapter(path, "kohya", modules, FAMILIES["sd1"], torch.float32, {})
    settings = {
        name: value
        for name, value in KINDS[kind].items()
        if name in ("kind", "targets", "lokr_factor", "alpha")
    }
    changes = {f"adapter.{name}": value for name, value in settings.items()} | {
        "adapter.start_from": str(path),
        "adapter.rank": 2,
    }
    changes |= {"base.model": str(base_of("sd1")), "training.text_encoder_learning_rate": 1e-3}
    run = tiny_run(changes)
    folder = run_folder.create(run)
    session = setup.prepare(run, folder, events.EventLog(folder / "events.jsonl"))
    torch.testing.assert_close(
        predict(session.model.base.family, session.model.base.pipe), wanted, rtol=0, atol=1e-5
    )
    assert json.loads(shared_config(run))["adapter"]["start_from"] == "first.safetensors"
    if kind != "varying":
        return
    monkeypatch.setattr(
        setup, "_encode_dataset", None
    )  # that takes minutes, and all of this is told before
    for wrong, words in (
        ({"adapter.kind": "loha"}, "Set it to the kind of the file"),
        ({"training.text_encoder_learning_rate": 0.0}, "text_encoder, which is not trained"),
        ({"adapter.targets": "attention"}, "adapter.targets leaves out"),
        ({"adapter.start_from": "/nowhere.safetensors"}, "no adapter file"),
    ):
        with pytest.raises((ConfigError, ModelError), match=words):
            setup.prepare(
                config.replace(run, wrong), folder, events.EventLog(folder / "events.jsonl")
            )
    with pytest.raises(ConfigError, match="does not go with adapter.start_from"):
        config.replace(run, {"adapter.init": "gaussian"})

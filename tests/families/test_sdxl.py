"""Stable Diffusion XL: size and crop, two text encoders, and its files."""

import json
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from tests.bases import XL_UNET
from trainer import config
from trainer.errors import ModelError
from trainer.families import FAMILIES, load_base
from trainer.families.base import Reading
from trainer.families.latent_diffusion import token_ids
from trainer.lora import targets
from trainer.models import hub
from trainer.training import validation
from trainer.training.step.losses import microbatch_losses


def test_the_denoiser_receives_the_crop_that_was_made(session_of, tmp_path):
    """A 48 x 24 image loses its sides; one of 16 x 24 is enlarged and loses top and bottom."""
    for name, size in (("wide", (48, 24)), ("tall", (16, 24))):
        Image.new("RGB", size, (200, 30, 30)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    session = session_of(
        "sdxl",
        **{
            "dataset.folder": str(tmp_path),
            "dataset.resolution": 24,
            "dataset.max_aspect": 1.0,
            "dataset.allow_upscale": True,
        },
    )
    tall, wide = (24, 16, 6, 0, 24, 24), (24, 48, 0, 12, 24, 24)
    assert [example.views[0].size_ids for example in session.data.examples] == [tall, wide]

    inputs = []
    session.model.base.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(kwargs["added_cond_kwargs"]), with_kwargs=True
    )
    sum(microbatch_losses(session, 0))
    assert sorted(inputs[0]["time_ids"].tolist()) == [list(tall), list(wide)]
    assert inputs[0]["text_embeds"].shape == (2, 24)
    validation.validation_losses(session)
    draws = validation.VALIDATION_TIMESTEPS
    assert inputs[1]["time_ids"].tolist() == [list(tall)] * draws


def test_prompts_are_encoded_as_by_the_pipeline(load):
    base = load("sdxl")
    ours = base.family.encode_prompts(base.pipe, ["a red star", ""])
    embeds, no_embeds, pooled, no_pooled = base.pipe.encode_prompt(
        "a red star", device="cpu", do_classifier_free_guidance=True
    )
    expected = {
        "prompt_embeds": torch.cat([embeds, no_embeds]),
        "pooled_prompt_embeds": torch.cat([pooled, no_pooled]),
    }
    torch.testing.assert_close(ours, expected)


def test_an_empty_prompt_is_zero_only_if_the_pipeline_is_configured_so(load):
    base = load("sdxl")
    zeros = base.family.encode_prompts(base.pipe, [""])
    assert not zeros["prompt_embeds"].any() and not zeros["pooled_prompt_embeds"].any()
    base.pipe.register_to_config(force_zeros_for_empty_prompt=False)
    encoded = base.family.encode_prompts(base.pipe, [""])
    assert encoded["prompt_embeds"].any() and encoded["pooled_prompt_embeds"].any()


def change_weights(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9))


@torch.no_grad()
def test_pooled_embeddings_are_the_projection_of_the_second_encoder(load):
    base, prompts = load("sdxl"), ["a red star", "two cats"]
    encoded = base.family.encode_prompts(base.pipe, prompts)
    second = base.pipe.text_encoder_2(token_ids(base.pipe.tokenizer_2, prompts))
    torch.testing.assert_close(encoded["pooled_prompt_embeds"], second.text_embeds)

    change_weights(base.pipe.text_encoder)
    changed = base.family.encode_prompts(base.pipe, prompts)
    assert torch.equal(changed["pooled_prompt_embeds"], encoded["pooled_prompt_embeds"])
    change_weights(base.pipe.text_encoder_2)
    changed = base.family.encode_prompts(base.pipe, prompts)
    assert not torch.allclose(changed["pooled_prompt_embeds"], encoded["pooled_prompt_embeds"])


@torch.no_grad()
def test_each_encoder_fills_its_own_columns_of_the_prompt_embeddings(load):
    base, prompts = load("sdxl"), ["a red star"]
    width = base.pipe.text_encoder.config.hidden_size
    before = base.family.encode_prompts(base.pipe, prompts)["prompt_embeds"]
    change_weights(base.pipe.text_encoder)
    after = base.family.encode_prompts(base.pipe, prompts)["prompt_embeds"]
    assert not torch.allclose(after[..., :width], before[..., :width])
    assert torch.equal(after[..., width:], before[..., width:])


@torch.no_grad()
def test_pooled_embeddings_of_a_long_prompt_are_those_of_its_first_chunk(load):
    base = load("sdxl")
    long, first_chunk = (" ".join(["a"] * words) for words in (100, 75))
    pooled = base.family.encode_prompts(base.pipe, [long], Reading(chunks=2))[
        "pooled_prompt_embeds"
    ]
    expected = base.family.encode_prompts(base.pipe, [first_chunk])["pooled_prompt_embeds"]
    torch.testing.assert_close(pooled, expected)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


REFUSED = {
    "encoder_of_another_class": (
        lambda d: edit_json(
            d / "model_index.json", text_encoder_2=["transformers", "CLIPTextModel"]
        ),
        "must be CLIPTextModelWithProjection",
    ),
    "encoder_that_runs_code": (
        lambda d: edit_json(d / "model_index.json", text_encoder_2=["os", "system"]),
        "names .* as text_encoder_2",
    ),
    "image_encoder_that_runs_code": (
        lambda d: edit_json(d / "model_index.json", image_encoder=["evil", "Encoder"]),
        None,
    ),
    "no_second_encoder": (
        lambda d: (d / "text_encoder_2/model.safetensors").unlink(),
        "weights text_encoder_2/.* missing",
    ),
    "no_second_vocabulary": (
        lambda d: [path.unlink() for path in (d / "tokenizer_2").iterdir()],
        "no vocabulary",
    ),
    "smaller_unet": (
        lambda d: edit_json(d / "unet/config.json", layers_per_block=1),
        "an unusual UNet, which cannot be trained",
    ),
    "refiner": (
        lambda d: edit_json(d / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline"),
        "is a StableDiffusionXLImg2ImgPipeline",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_folder_is_refused_and_runs_nothing(case, base_of, tmp_path, monkeypatch):
    """A part that training does not use is never loaded, whatever it names."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'PWNED')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = shutil.copytree(base_of("sdxl"), tmp_path / "model")
    spoil, words = REFUSED[case]
    spoil(folder)
    if words is None:
        load_base(config.Base(model=str(folder)), torch.float32)
    else:
        with pytest.raises(ModelError, match=words) as error:
            load_base(config.Base(model=str(folder)), torch.float32)
        assert str(error.value).endswith(".")
    assert not (tmp_path / "PWNED").exists()


def test_only_files_that_are_used_are_downloaded():
    """SDXL's repository also contains single files, two older VAEs and three other formats."""
    wanted = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder_2/config.json",
        "text_encoder_2/model.safetensors",
        "tokenizer_2/merges.txt",
        "tokenizer_2/vocab.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    other = [
        "sd_xl_base_1.0.safetensors",
        "sd_xl_offset_example-lora_1.0.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/model.onnx",
        "unet/openvino_model.bin",
        "vae_1_0/diffusion_pytorch_model.safetensors",
        "vae_decoder/config.json",
        "text_encoder/flax_model.msgpack",
        "safety_checker/model.safetensors",
    ]
    assert sorted(hub.wanted_files(wanted + other)) == sorted(wanted)
    assert hub.wanted_files(wanted)[-1] == "model_index.json"


def attention_keys(blocks, depth):
    """Returns the keys of a kohya file, independently of the code that is tested."""
    return {
        f"lora_unet_{block}_transformer_blocks_{layer}_{attention}_{projection}"
        for block in blocks
        for layer in range(depth)
        for attention in ("attn1", "attn2")
        for projection in ("to_q", "to_k", "to_v", "to_out_0")
    }


def test_the_full_unet_has_stabilitys_keys():
    """The keys follow sd_xl_base.yaml: depth 2 at 640 channels, 10 at 1280."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**XL_UNET)
    projections = [
        name
        for name, layer in unet.named_modules()
        if isinstance(layer, torch.nn.Linear) and name.endswith(targets.ATTENTION)
    ]
    keys = {name: FAMILIES["sdxl"].kohya_key("unet", name) for name in projections}
    shallow = ["input_blocks_4_1", "input_blocks_5_1"]
    shallow += [f"output_blocks_{number}_1" for number in (3, 4, 5)]
    deep = ["input_blocks_7_1", "input_blocks_8_1", "middle_block_1"]
    deep += [f"output_blocks_{number}_1" for number in (0, 1, 2)]
    expected = attention_keys(shallow, depth=2) | attention_keys(deep, depth=10)
    assert len(projections) == len(expected) == 560  # 70 transformer blocks of 8 projections
    assert set(keys.values()) == expected


@pytest.mark.parametrize(
    "module, key",
    [
        (
            "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q",
            "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q",
        ),
        (
            "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k",
            "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_k",
        ),
        (
            "mid_block.attentions.0.transformer_blocks.3.attn1.to_out.0",
            "lora_unet_middle_block_1_transformer_blocks_3_attn1_to_out_0",
        ),
        (
            "up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_v",
            "lora_unet_output_blocks_2_1_transformer_blocks_0_attn2_to_v",
        ),
        (
            "up_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q",
            "lora_unet_output_blocks_3_1_transformer_blocks_1_attn1_to_q",
        ),
    ],
)
def test_a_module_has_the_key_of_its_block_in_stabilitys_unet(module, key):
    assert FAMILIES["sdxl"].kohya_key("unet", module) == key

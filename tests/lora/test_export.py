"""The tensors of an adapter in each file format."""

import pytest
import torch

from tests.lora.helpers import lora, random_pair
from trainer import config
from trainer.families import FAMILIES, load_base
from trainer.lora import export, inject, writer

FAMILY = FAMILIES["sd1"]
UNET_BLOCKS = (
    "down_blocks_0_attentions_0",
    "mid_block_attentions_0",
    "up_blocks_1_attentions_0",
    "up_blocks_1_attentions_1",
)
GOLDEN_UNET = [
    f"lora_unet_{block}_transformer_blocks_0_{attention}_{projection}"
    for block in UNET_BLOCKS
    for attention in ("attn1", "attn2")
    for projection in ("to_q", "to_k", "to_v", "to_out_0")
]
GOLDEN_TEXT = [
    f"lora_te_text_model_encoder_layers_{layer}_self_attn_{projection}"
    for layer in (0, 1)
    for projection in ("q_proj", "k_proj", "v_proj", "out_proj")
]
GOLDEN = {"unet": GOLDEN_UNET, "text_encoder": GOLDEN_TEXT}


def trained_base(tiny_base, parts, **settings):
    """Returns a base with a random adapter, as if trained, and its adapted components."""
    base = load_base(config.Base(model=str(tiny_base)), torch.float32)
    components = {part: getattr(base.pipe, part) for part in parts}
    draw = torch.Generator().manual_seed(3)
    for part, component in components.items():
        adapter = config.Adapter(**({"rank": 3, "alpha": 5.0} | settings))
        inject.inject(component, part, adapter, seed=1)
        for parameter in inject.trainable(component).values():
            torch.nn.init.normal_(parameter, std=0.2, generator=draw)
    return base, components


def predict(pipe):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embeds = FAMILY.encode_prompts(pipe, ["a red star, żółć"])["prompt_embeds"]
        embeds = embeds.expand(2, -1, -1)
        return pipe.unet(latents, 400, encoder_hidden_states=embeds).sample


@pytest.mark.parametrize("parts", [("unet",), ("unet", "text_encoder"), ("text_encoder",)])
def test_the_keys_are_the_golden_list(tiny_base, parts):
    _, components = trained_base(tiny_base, parts)
    tensors = export.to_kohya(inject.adapted_modules(components), FAMILY, torch.float16)
    keys = [key for part in parts for key in GOLDEN[part]]
    ends = ("lora_down.weight", "lora_up.weight", "alpha")
    assert set(tensors) == {f"{key}.{end}" for key in keys for end in ends}
    alphas = [tensor for name, tensor in tensors.items() if name.endswith("alpha")]
    assert all(float(alpha) == 5.0 and alpha.shape == () for alpha in alphas)


@pytest.mark.parametrize("parts", [("unet",), ("unet", "text_encoder")])
@pytest.mark.parametrize(("rank", "alpha"), [(3, 5.0), (4, 4.0), (2, 1.0)])
def test_a_new_diffusers_pipeline_does_what_was_trained(tiny_base, tmp_path, parts, rank, alpha):
    base, components = trained_base(tiny_base, parts, rank=rank, alpha=alpha)
    path = tmp_path / "a.safetensors"
    modules = list(inject.adapted_modules(components))
    writer.save_adapter(path, "kohya", modules, FAMILY, torch.float32, {})
    pipe = FAMILY.pipeline_class.from_pretrained(
        tiny_base, safety_checker=None, requires_safety_checker=False
    )
    plain, trained = predict(pipe), predict(base.pipe)
    pipe.load_lora_weights(str(path))
    assert (trained - plain).norm() > 0.05 * plain.norm()
    torch.testing.assert_close(predict(pipe), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("strength", [0.5, 2.0, -1.0])
def test_diffusers_scales_delta_w_by_the_strength(tiny_base, strength):
    """At strength s a weight is W + s delta W. Compared with weights that were merged by hand."""
    _, components = trained_base(tiny_base, ("unet",))
    modules = list(inject.adapted_modules(components))
    merged = load_base(config.Base(model=str(tiny_base)), torch.float32).pipe
    for module in modules:
        merged.unet.get_submodule(module.name).weight.data += strength * module.delta
    loaded = load_base(config.Base(model=str(tiny_base)), torch.float32).pipe
    loaded.load_lora_weights(export.to_kohya(modules, FAMILY, torch.float32), adapter_name="x")
    loaded.set_adapters(["x"], [strength])
    torch.testing.assert_close(predict(loaded), predict(merged), rtol=0, atol=2e-5)


def test_scales_that_differ_are_folded_into_one_alpha():
    modules = [
        lora("block.2", torch.ones(2, 3), torch.ones(2, 2), scale=3.0),
        lora("block.4", torch.ones(4, 3), torch.ones(2, 4), scale=0.25),
    ]
    tensors = export.to_kohya(modules, FAMILY, torch.float32)
    alphas = {float(tensor) for name, tensor in tensors.items() if name.endswith("alpha")}
    assert alphas == {6.0}
    for module in modules:
        key = FAMILY.kohya_key("unet", module.name)
        product = tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]
        torch.testing.assert_close(6.0 / module.rank * product, module.delta)


PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")
OPEN_CLIP = [("sd2", "text_encoder"), ("sdxl", "text_encoder_2")]


@pytest.mark.parametrize("adapted", [("q_proj",), ("out_proj",), ("k_proj", "v_proj")])
@pytest.mark.parametrize(("family", "component"), OPEN_CLIP)
def test_an_open_clip_attention_that_is_adapted_in_part_is_padded(family, component, adapted):
    """A1111 ignores an attention that lacks one of the four. What is added changes nothing."""
    attention = "encoder.layers.1.self_attn"
    pair = random_pair(outputs=32, inputs=32)
    modules = [lora(f"{attention}.{part}", *pair, component=component) for part in adapted]
    tensors = export.to_kohya(modules, FAMILIES[family], torch.float32)
    changes = {}
    for part in PARTS:
        key = FAMILIES[family].kohya_key(component, f"{attention}.{part}")
        down, up = (tensors[f"{key}.lora_{name}.weight"] for name in ("down", "up"))
        assert down.shape == (2, 32) and up.shape == (32, 2)
        assert float(tensors[f"{key}.alpha"]) == 2.0
        changes[part] = bool((up @ down).any())
    assert changes == {part: part in adapted for part in PARTS}
    assert len(tensors) == 3 * len(PARTS)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("sd1", "encoder.layers.1.self_attn.q_proj"),
        ("sd2", "encoder.layers.1.mlp.fc1"),
        ("sdxl", "encoder.layers.1.self_attn.q_proj"),
    ],
)
def test_other_layers_of_text_encoders_are_not_padded(family, name):
    """The first encoder of SDXL and the encoder of 1.x have separate projections."""
    module = lora(name, *random_pair(outputs=32, inputs=32), component="text_encoder")
    assert len(export.to_kohya([module], FAMILIES[family], torch.float32)) == 3


@pytest.mark.parametrize("file_format", ["kohya", "diffusers", "peft"])
@pytest.mark.parametrize("size", [1e-8, 1e-6, 1e-3, 1.0])
def test_fp16_can_contain_the_adapter_of_the_first_steps(tmp_path, file_format, size):
    """B is about as large as the learning rate then. The smallest number of fp16 is 6e-8."""
    down, up = random_pair(4, 32, 32)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    modules = [lora(name, down / 5, size * up, scale=0.25)]
    path = tmp_path / "young.safetensors"
    writer.save_adapter(path, file_format, modules, FAMILY, torch.float16, {})
    (saved,) = writer.verify(path, modules).modules
    error = (saved.delta - modules[0].delta).norm() / modules[0].delta.norm()
    assert error < 5e-3

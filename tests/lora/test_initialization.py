"""How A and B of a new LoRA start."""

import pytest
import torch

from trainer import config
from trainer.families import load_base
from trainer.lora import initialization, inject, writer

QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CHANGING = ["orthogonal", "pissa", "olora"]
"""The initializations whose A and B are both large."""


@pytest.fixture
def base(tiny_base):
    return load_base(config.Base(model=str(tiny_base)), torch.float32)


def injected(base, **settings):
    adapter = config.Adapter(**({"rank": 2, "alpha": 4.0} | settings))
    inject.inject(base.pipe.unet, "unet", adapter, seed=1)
    return base.pipe.unet


def factors(unet):
    """Returns A, B, the frozen weight and the scale of a layer."""
    layer = unet.get_submodule(QUERY)
    a, b = layer.lora_A[inject.ADAPTER].weight, layer.lora_B[inject.ADAPTER].weight
    return a.detach(), b.detach(), layer.base_layer.weight, layer.scaling[inject.ADAPTER]


@pytest.mark.parametrize("rank", [3, 40])
@pytest.mark.parametrize("init", initialization.INITS)
def test_every_start_computes_what_the_base_computes(base, init, rank):
    """Rank 40 is larger than the smaller sides of the weights."""
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=draw)
    embeds = torch.randn(2, 5, 32, generator=draw)
    with torch.no_grad():
        before = base.pipe.unet(latents, 500, encoder_hidden_states=embeds).sample
        unet = injected(base, init=init, targets="linear+conv", rank=rank)
        after = unet(latents, 500, encoder_hidden_states=embeds).sample
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [3, 40])
def test_gaussian_draws_a_and_sets_b_to_zero(base, rank):
    a, b, _, _ = factors(injected(base, init="gaussian", rank=rank))
    assert not b.any() and float(a.std()) * rank == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("rank", [3, 40])
def test_orthogonal_starts_with_a_product_of_zero(base, rank):
    a, b, _, _ = factors(injected(base, init="orthogonal", rank=rank))
    assert a.any() and b.any() and (b @ a).norm() < 1e-5


def test_pissa_starts_with_the_largest_singular_values(base):
    a, b, weight, scale = factors(injected(base, init="pissa", rank=3))
    values = torch.linalg.svdvals(weight)
    rest = torch.linalg.svdvals(weight - scale * b @ a)[: len(values) - 3]
    torch.testing.assert_close(rest, values[3:], rtol=1e-3, atol=1e-5)


def test_olora_starts_with_orthonormal_columns(base):
    _, b, _, _ = factors(injected(base, init="olora", rank=3))
    torch.testing.assert_close(b.T @ b, torch.eye(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_rank_above_the_smaller_side_starts_with_the_whole_weight(base, init):
    a, b, weight, scale = factors(injected(base, init=init, rank=40))
    product = b @ a * (scale if init == "pissa" else 1.0)
    torch.testing.assert_close(product, weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("targets", ["attention", "linear+conv"])
@pytest.mark.parametrize("init", CHANGING)
def test_a_small_change_survives_the_rounding_of_the_file(base, init, targets, tmp_path):
    """A and B start as large as W, and their product is subtracted again."""
    unet = injected(base, init=init, targets=targets, rank=8)
    draw = torch.Generator().manual_seed(0)
    for parameter in inject.trainable(unet).values():
        parameter.data += 1e-3 * torch.randn(parameter.shape, generator=draw)
    modules = list(inject.adapted_modules({"unet": unet}))
    for module in modules:
        weight = unet.get_submodule(module.name).get_base_layer().weight
        assert module.delta.norm() < 0.1 * weight.norm()
    path = tmp_path / "a.safetensors"
    writer.save_adapter(path, "kohya", modules, base.family, torch.float16, {})
    assert len(writer.verify(path, modules).modules) == len(modules)

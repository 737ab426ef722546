"""The fused forward gives PEFT's results, and is used only if it computes what PEFT would."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from trainer import config
from trainer.families import load_base
from trainer.lora import inject
from trainer.lora.fused_linear import FusedLinear, register_fused_linear


class QuantizedLinear(nn.Linear):
    """A subclass, as in bitsandbytes."""


def adapted_linear(fused: bool = False, base: nn.Linear | None = None) -> nn.Module:
    torch.manual_seed(0)
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    if fused:
        register_fused_linear(lora)
    model = nn.Sequential(base or nn.Linear(5, 7))
    return inject_adapter_in_model(lora, model).requires_grad_(True)


def output_and_gradients(model: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    x = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    output = model(x)
    output.float().square().sum().backward()
    down, up = (part["default"].weight.grad for part in (model[0].lora_A, model[0].lora_B))
    return [output.detach(), x.grad, down, up]


def test_output_and_gradients_are_equal_to_pefts():
    fused, plain = adapted_linear(fused=True), adapted_linear()
    assert type(fused[0]) is FusedLinear
    pairs = zip(output_and_gradients(fused), output_and_gradients(plain), strict=True)
    for result, expected in pairs:
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_registration_draws_the_same_weights_and_names_the_same_parameters():
    """A checkpoint of either layer can be loaded into the other."""
    fused, plain = adapted_linear(fused=True).state_dict(), adapted_linear().state_dict()
    assert list(fused) == list(plain)
    assert all(torch.equal(fused[name], plain[name]) for name in fused)


def test_half_precision_base_gives_near_results_and_float32_gradients():
    fused, exact = adapted_linear(fused=True), output_and_gradients(adapted_linear())
    fused[0].base_layer.to(torch.bfloat16)
    results = output_and_gradients(fused, torch.bfloat16)
    half, full = torch.bfloat16, torch.float32
    assert [result.dtype for result in results] == [half, half, full, full]
    for result, expected in zip(results, exact, strict=True):
        assert (result.float() - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("change", ["disabled", "merged", "another adapter"])
def test_pefts_forward_is_used_if_the_adapter_is_disabled_merged_or_not_alone(change):
    fused, plain = adapted_linear(fused=True), adapted_linear()
    for model in (fused, plain):
        if change == "disabled":
            model[0].enable_adapters(False)
        elif change == "merged":
            model[0].merge()
        else:
            torch.manual_seed(2)
            second = LoraConfig(r=2, init_lora_weights=False)
            model[0].update_layer("second", r=2, lora_alpha=2, config=second)
            model[0].set_adapter("second")
    x = torch.randn(1, 5)
    assert torch.equal(fused(x), plain(x))


def test_a_quantised_layer_keeps_pefts_layer():
    model = adapted_linear(fused=True, base=QuantizedLinear(5, 7))
    assert type(model[0]) is not FusedLinear


@pytest.mark.parametrize(
    ("settings", "is_fused"),
    [
        ({}, True),
        ({"kind": "rslora"}, True),
        ({"init": "pissa"}, True),
        ({"dropout": 0.1}, False),
        ({"rank_dropout": 0.1}, False),
        ({"module_dropout": 0.1}, False),
        ({"kind": "dora"}, False),
    ],
)
def test_only_a_lora_without_dropout_is_fused(tiny_base, settings, is_fused):
    unet = load_base(config.Base(model=str(tiny_base)), torch.float32).pipe.unet
    inject.inject(unet, "unet", config.Adapter(**({"rank": 2} | settings)), seed=1)
    layer = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    assert isinstance(layer, FusedLinear) == is_fused

"""The fused forward is PEFT's, and steps aside wherever it would not be."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from trainer.lora.fused_linear import FusedLinear, register_fused_linear


def layer(fused=False, **settings) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=False, **settings
    )
    if fused:
        register_fused_linear(config)
    model = inject_adapter_in_model(config, nn.Sequential(nn.Linear(5, 7)))
    return model.requires_grad_(True)


def outcome(model: nn.Module, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    x = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    output = model(x)
    output.float().square().sum().backward()
    lora = model[0]
    return [
        output.detach(),
        x.grad,
        lora.lora_A["default"].weight.grad,
        lora.lora_B["default"].weight.grad,
    ]


def test_output_and_gradients_are_those_of_peft():
    ours = layer(fused=True)
    assert type(ours[0]) is FusedLinear
    for mine, theirs in zip(outcome(ours), outcome(layer()), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_half_precision_base_is_near_the_exact_result_and_gives_float32_gradients():
    ours, exact = layer(fused=True), outcome(layer())
    ours[0].base_layer.to(torch.bfloat16)
    results = outcome(ours, torch.bfloat16)
    assert [r.dtype for r in results] == [
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
        torch.float32,
    ]
    for mine, theirs in zip(results, exact, strict=True):
        assert (mine.float() - theirs).norm() / theirs.norm() < 0.02


@pytest.mark.parametrize("change", ["off", "merged", "other"])
def test_it_gives_way_where_the_adapter_is_off_merged_or_another(change):
    ours, peft = layer(fused=True), layer()
    for model in (ours, peft):
        if change == "off":
            model[0].enable_adapters(False)
        elif change == "merged":
            model[0].merge()
        else:
            torch.manual_seed(2)
            model[0].update_layer(
                "second", r=2, lora_alpha=2, config=LoraConfig(r=2, init_lora_weights=False)
            )
            model[0].set_adapter("second")
    x = torch.randn(1, 5)
    assert torch.equal(ours(x), peft(x))

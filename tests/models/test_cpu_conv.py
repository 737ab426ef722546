"""Convolutions as matrix products give torch's results and are used only if they are faster."""

import copy

import pytest
import torch
from torch import nn

from trainer.models import cpu_conv


def output_and_gradient(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    output = layer(x)
    return output.detach(), torch.autograd.grad(output.square().sum(), x)[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 6, 4, 4), (3, 6, 5, 2)])
def test_matrix_products_give_the_output_and_gradient_of_torch(monkeypatch, shape, bias):
    monkeypatch.setattr(cpu_conv, "WEIGHTS_PER_POSITION", 0)
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Conv2d(6, 7, 3, padding=1, bias=bias)).requires_grad_(False)
    model, x = copy.deepcopy(reference), torch.randn(shape)
    cpu_conv.use_matrix_products(model)
    results, expected = output_and_gradient(model, x), output_and_gradient(reference, x)
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)
        assert result.is_contiguous()


def test_torch_convolves_many_positions_and_other_number_formats(monkeypatch):
    def unexpected(*args, **kwargs):
        pytest.fail("computed as a matrix product")

    monkeypatch.setattr(cpu_conv, "unfold", unexpected)
    layer = nn.Sequential(nn.Conv2d(320, 320, 3, padding=1)).requires_grad_(False)
    cpu_conv.use_matrix_products(layer)
    layer(torch.randn(1, 320, 4, 4))
    layer.bfloat16()(torch.randn(1, 320, 1, 1).bfloat16())


def test_only_convolutions_that_keep_the_size_are_replaced_and_parameters_stay():
    layers = {
        "same": nn.Conv2d(4, 4, 3, padding=1),
        "smaller": nn.Conv2d(4, 4, 3, stride=2, padding=1),
        "single": nn.Conv2d(4, 4, 1),
    }
    layers["groups"] = nn.Conv2d(4, 4, 3, padding=1, groups=2)
    model = nn.ModuleDict(layers)
    model.eval()
    before = dict(model.named_parameters())
    cpu_conv.use_matrix_products(model)
    replaced = [name for name, layer in model.items() if type(layer) is cpu_conv.MatrixConv2d]
    assert replaced == ["same"]
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert not any(layer.training for layer in model.modules())

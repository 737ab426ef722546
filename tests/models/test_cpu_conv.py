"""A convolution as a matrix product is torch's own, and is taken only where it pays."""

import copy

import pytest
import torch
from torch import nn

from trainer.models import cpu_conv


def outcome(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    output = layer(x)
    return output.detach(), torch.autograd.grad(output.square().sum(), x)[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 6, 4, 4), (3, 6, 5, 2)])
def test_output_and_gradient_are_those_of_torch(monkeypatch, shape, bias):
    monkeypatch.setattr(cpu_conv, "WEIGHTS_PER_POSITION", 0)
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Conv2d(6, 7, 3, padding=1, bias=bias)).requires_grad_(False)
    ours, x = copy.deepcopy(theirs), torch.randn(shape)
    cpu_conv.use_matrix_products(ours)
    for mine, plain in zip(outcome(ours, x), outcome(theirs, x), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)
        assert mine.is_contiguous()


def test_many_positions_and_other_number_formats_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(
        cpu_conv, "unfold", lambda *args, **kwargs: pytest.fail("as a matrix product")
    )
    layer = nn.Sequential(nn.Conv2d(320, 320, 3, padding=1)).requires_grad_(False)
    cpu_conv.use_matrix_products(layer)
    layer(torch.randn(1, 320, 4, 4))
    layer.bfloat16()(torch.randn(1, 320, 1, 1).bfloat16())


def test_only_what_keeps_its_size_is_changed_and_names_stay():
    layers = {
        "same": nn.Conv2d(4, 4, 3, padding=1),
        "smaller": nn.Conv2d(4, 4, 3, stride=2, padding=1),
        "single": nn.Conv2d(4, 4, 1),
    }
    layers["groups"] = nn.Conv2d(4, 4, 3, padding=1, groups=2)
    model = nn.ModuleDict(layers)
    before = list(model.state_dict())
    cpu_conv.use_matrix_products(model)
    assert [name for name, layer in model.items() if type(layer) is cpu_conv.MatrixConv2d] == [
        "same"
    ]
    assert list(model.state_dict()) == before

"""How A and B of a new LoRA start, apart from PEFT's default."""

from collections.abc import Callable
from functools import partial

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear


def _gaussian(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Draws A from a normal distribution and sets B to zero, as in the paper on LoRA."""
    return torch.randn(rank, weight.shape[1]) / rank, torch.zeros(weight.shape[0], rank)


def _orthogonal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Draws A and B at random with B A = 0.

    They use different rows of one orthogonal matrix (datta0.github.io, "Rethink LoRA init").
    """
    rows, half = torch.linalg.qr(torch.randn(rank, rank))[0], rank // 2
    a = (torch.randn(weight.shape[1], half) @ rows[:half]).T / 10
    b = torch.randn(weight.shape[0], rank - half) @ rows[half:] / 10
    return a, b


def _pissa(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Uses the largest singular values (Meng et al. 2024, arXiv:2404.02948, equations 2 and 3)."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = (values[:rank] / scale).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def _olora(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Uses the first rows and columns of the QR decomposition.

    Bueyuekakyuez 2024, arXiv:2406.01775, section 3.
    """
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


INITS: dict[str, Callable[[Tensor, int, float], tuple[Tensor, Tensor]]] = {
    "gaussian": _gaussian,
    "orthogonal": _orthogonal,
    "pissa": _pissa,
    "olora": _olora,
}
"""A [r, in] and B [out, r] by weight [out, in], rank and scale. Keys are values of adapter.init."""


def initialize(layer: LoraLayer, adapter: str, init: str) -> None:
    """Fills A and B of an adapter in PEFT's layer.

    If their product is not zero, each forward pass and the saved file subtract it. PEFT would
    change the frozen W instead. That rounds W in half precision, and leaves a base that is not
    the original base.
    """
    down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    with torch.no_grad():
        weight = dequantize_module_weight(layer.get_base_layer()).float().flatten(1)
        a, b = INITS[init](weight, down.shape[0], layer.scaling[adapter])
        # A matrix has no more singular values than its smaller side. Further ranks keep PEFT's A
        # and a B of zero.
        down.flatten(1)[: a.shape[0]] = a.to(weight.device)
        up.zero_()
        up.flatten(1)[:, : b.shape[1]] = b.to(weight.device)
    layer.starts_large = init != "gaussian"
    if init in ("pissa", "olora"):
        layer.register_buffer("start_down", down.detach().clone(), persistent=False)
        layer.register_buffer("start_up", up.detach().clone(), persistent=False)
        layer.register_forward_hook(partial(_subtract_start, adapter))


def _subtract_start(
    adapter: str, layer: LoraLayer, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """A forward hook: subtracts the product that A and B started with."""
    if layer.disable_adapters:
        return output
    base, x = layer.get_base_layer(), inputs[0].to(layer.start_down.dtype)
    if isinstance(base, nn.Conv2d):
        hidden = conv2d(x, layer.start_down, None, base.stride, base.padding, base.dilation)
        start = conv2d(hidden, layer.start_up)
    else:
        start = linear(linear(x, layer.start_down), layer.start_up)
    return output - (layer.scaling[adapter] * start).to(output.dtype)

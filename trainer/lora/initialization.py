"""How A and B of a new LoRA start."""

from collections.abc import Callable

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

ADAPTER = "atelier"  # the name of the adapter inside PEFT's layers


def _gaussian(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A normal, B zero, as in the paper of LoRA."""
    return torch.randn(rank, weight.shape[1]) / rank, torch.zeros(weight.shape[0], rank)


def _orthogonal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Both random, with B A = 0: they live in rows of one orthogonal matrix that share nothing (datta0.github.io, "Rethink LoRA init")."""
    rows, half = torch.linalg.qr(torch.randn(rank, rank))[0], rank // 2
    return (torch.randn(weight.shape[1], half) @ rows[:half]).T / 10, torch.randn(
        weight.shape[0], rank - half
    ) @ rows[half:] / 10


def _pissa(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """The strongest singular directions (Meng et al. 2024, arXiv:2404.02948, equations 2 and 3)."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = (values[:rank] / scale).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def _olora(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """The first rows and columns of the QR decomposition (Bueyuekakyuez 2024, arXiv:2406.01775, section 3)."""
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


INITS: dict[str, Callable[[Tensor, int, float], tuple[Tensor, Tensor]]] = {
    "gaussian": _gaussian,
    "orthogonal": _orthogonal,
    "pissa": _pissa,
    "olora": _olora,
}


@torch.no_grad()
def _start(layer: LoraLayer, init: str) -> None:
    """Fills A and B. Where their product is not zero it is taken off again in every forward pass, and in the file.

    PEFT changes the frozen W instead, which rounds it in half precision, and leaves a base that is no longer the base.
    """
    down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    weight = dequantize_module_weight(layer.get_base_layer()).float().flatten(1)
    a, b = (
        part.to(weight.device)
        for part in INITS[init](weight, down.shape[0], layer.scaling[ADAPTER])
    )
    # A matrix has no more directions than its smaller side; ranks beyond start as usual.
    down.flatten(1)[: a.shape[0]] = a
    up.zero_()
    up.flatten(1)[:, : b.shape[1]] = b
    layer.starts_large = init != "gaussian"
    if init in ("pissa", "olora"):
        layer.register_buffer("start_down", down.detach().clone(), persistent=False)
        layer.register_buffer("start_up", up.detach().clone(), persistent=False)
        layer.register_forward_hook(_without_start)


def _without_start(layer: LoraLayer, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    if layer.disable_adapters:
        return output
    base, x = layer.get_base_layer(), inputs[0].to(layer.start_down.dtype)
    if isinstance(base, nn.Conv2d):
        start = conv2d(
            conv2d(x, layer.start_down, None, base.stride, base.padding, base.dilation),
            layer.start_up,
        )
    else:
        start = linear(linear(x, layer.start_down), layer.start_up)
    return output - (layer.scaling[ADAPTER] * start).to(output.dtype)

"""The forward and backward pass of a LoRA on a linear layer, with fewer casts and copies.

PEFT's forward casts the input to the adapter's float32, multiplies there, and adds the result in
a separate pass. Here base and adapter share the base's dtype, as under autocast but without its
casts in every layer. The scale is applied to `rank` columns instead of all outputs, and each
addition, forward and backward, is part of a matrix product.
"""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn.functional import linear


class LoraLinear(torch.autograd.Function):
    """y = x W^T + b + scale (x A^T) B^T (Hu et al. 2021, arXiv:2106.09685, section 4.1).

    Computes the gradients of x, A and B.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
    ) -> Tensor:
        """Returns y [..., outputs].

        Takes x [..., inputs], weight [outputs, inputs], A [rank, inputs] and B [outputs, rank].
        If x is in half precision and A and B are float32, they are rounded to the dtype of x.
        Their gradients are float32.
        """
        down, up = down.to(x.dtype), up.to(x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        hidden = (rows @ down.t()).mul_(scale)
        ctx.save_for_backward(rows, weight, down, up, hidden)
        ctx.scale = scale
        output = linear(rows, weight, bias).addmm_(hidden, up.t())
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        rows, weight, down, up, hidden = ctx.saved_tensors
        outer = gradient.reshape(-1, gradient.shape[-1])
        inner = (outer @ up).mul_(ctx.scale)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (outer @ weight).addmm_(inner, down).view(*gradient.shape[:-1], -1)
        return to_x, None, None, (inner.t() @ rows).float(), (outer.t() @ hidden).float(), None


class FusedLinear(lora.Linear):
    """PEFT's layer with the forward of `LoraLinear`.

    It is used while the adapter that created the layer is the only one, not merged and not
    disabled. Otherwise PEFT's forward is used.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **options: Any) -> None:
        super().__init__(base_layer, adapter_name, **options)
        self.fused_adapter = adapter_name

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self.fused_adapter
        if self.active_adapters != [name] or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        return LoraLinear.apply(
            x,
            base.weight,
            base.bias,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
        )


def register_fused_linear(config: LoraConfig) -> None:
    """Makes PEFT create a `FusedLinear` for each linear layer that this adapter is put on.

    The adapter must be a LoRA without any kind of dropout and without DoRA, which `LoraLinear`
    does not compute.
    """
    config._register_custom_module({nn.Linear: _fused_linear})


def _fused_linear(
    target: nn.Module, adapter_name: str, parameter_name: str | None = None, **options: Any
) -> FusedLinear | None:
    """Returns the layer, or None to let PEFT choose one, as for a quantised subclass of Linear."""
    if type(target) is not nn.Linear or parameter_name is not None:
        return None
    return FusedLinear(target, adapter_name, **options)

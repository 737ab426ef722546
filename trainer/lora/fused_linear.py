"""The arithmetic of a LoRA on a linear layer without a needless cast, copy or pass over memory.

PEFT's forward casts the layer's input to the adapter's float32, multiplies there, and adds in a pass of its own. Here the base and
the adapter share the base's number format (as autocast has it, but without its casts in every layer), the scale falls on the `rank`
columns instead of all outputs, and both additions, forward and backward, happen inside a matrix product.
"""

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn.functional import linear


class LoraLinear(torch.autograd.Function):
    """y = x W^T + b + scale (x A^T) B^T (Hu et al. 2021, arXiv:2106.09685, section 4.1), and its gradients for x, A and B."""

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
        """x [..., inputs], weight [outputs, inputs], down (A) [rank, inputs], up (B) [outputs, rank].

        A and B may be float32 beside an x in half precision; they are rounded to it, and their gradients come back in float32.
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
        to_x = (
            (outer @ weight).addmm_(inner, down).view(*gradient.shape[:-1], -1)
            if ctx.needs_input_grad[0]
            else None
        )
        return to_x, None, None, (inner.t() @ rows).float(), (outer.t() @ hidden).float(), None


class FusedLinear(lora.Linear):
    """PEFT's layer with the forward above, as long as the one adapter it was made for is alone and neither merged nor switched off."""

    fused_adapter: str

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


def fuse(component: nn.Module, adapter: str) -> None:
    """Gives the fused forward to every plain LoRA of a component: no dropout of any kind, no DoRA, no quantised base."""
    for layer in component.modules():
        if (
            type(layer) is lora.Linear
            and type(layer.base_layer) is nn.Linear
            and _is_plain(layer, adapter)
        ):
            layer.__class__ = FusedLinear
            layer.fused_adapter = adapter


def _is_plain(layer: lora.Linear, adapter: str) -> bool:
    drops = (
        not isinstance(layer.lora_dropout[adapter], nn.Identity)
        or layer.lora_A[adapter]._forward_hooks
    )
    return not drops and not layer.use_dora[adapter]

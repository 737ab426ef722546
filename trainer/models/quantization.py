"""The frozen denoiser with its weights rounded to 4 or 8 bits, by bitsandbytes.

Sources: QLoRA for 4 bits (Dettmers et al. 2023, arXiv:2305.14314), LLM.int8() for 8 bits (Dettmers
et al. 2022, arXiv:2208.07339).
"""

import logging
from typing import Any

import torch
from torch import nn

from trainer.errors import ConfigError

FAILURES = (
    ImportError,
    OSError,
    RuntimeError,
    NotImplementedError,
    AttributeError,
    ValueError,
    AssertionError,
)
"""What bitsandbytes raises if it is missing, was built for another CUDA, or does not support the
GPU."""


def quantize(denoiser: nn.Module, how: str, dtype: torch.dtype, device: torch.device) -> None:
    """Replaces the linear layers by 8-bit or 4-bit ones; `how` is "8bit" or "4bit".

    The weights are rounded when the denoiser is moved to the device. Convolutions and norms keep
    their weights, since bitsandbytes has no convolutions. So do the text encoders, which are not
    on the device while training unless they are trained.

    Raises ConfigError if bitsandbytes is missing or does not work on this device.
    """
    bitsandbytes = load_bitsandbytes(how, dtype, device)
    for name, layer in list(denoiser.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, child = name.rpartition(".")
            quantized = _quantized_linear(bitsandbytes, layer, how, dtype)
            setattr(denoiser.get_submodule(parent), child, quantized)
    # PEFT chooses the class of its layers by this attribute.
    setattr(denoiser, f"is_loaded_in_{how}", True)


def load_bitsandbytes(how: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Returns the module bitsandbytes after running one layer forward and backward on the device.

    Raises ConfigError if that does not work.
    """
    if device.type != "cuda":
        raise ConfigError(
            f"base.quantization = {how} needs an NVIDIA GPU, and this device is {device.type}; "
            "set it to none."
        )
    try:
        import bitsandbytes

        # Otherwise every layer logs that it computes in fp16.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        layer = _quantized_linear(bitsandbytes, nn.Linear(64, 64), how, dtype).to(device)
        inputs = torch.ones(2, 64, dtype=dtype, device=device, requires_grad=True)
        layer(inputs).float().sum().backward()
        if inputs.grad is not None and torch.isfinite(inputs.grad).all():
            return bitsandbytes
        reason = "it gives no gradients"
    except FAILURES as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
    raise ConfigError(
        f"base.quantization = {how} needs the bitsandbytes package and a GPU that it supports, "
        f"and does not work here ({reason}). Install the extra with "
        "`pip install lora-atelier[bitsandbytes]`, or set base.quantization = none."
    ) from None


def _quantized_linear(
    bitsandbytes: Any, layer: nn.Linear, how: str, dtype: torch.dtype
) -> nn.Module:
    """Returns a layer of bitsandbytes with the weights of this one, not rounded yet."""
    shape, bias = (layer.in_features, layer.out_features), layer.bias is not None
    if how == "4bit":
        storage = {"compress_statistics": True, "quant_type": "nf4"}
        new = bitsandbytes.nn.Linear4bit(
            *shape, bias=bias, compute_dtype=dtype, device="meta", **storage
        )
        new.weight = bitsandbytes.nn.Params4bit(
            layer.weight.data, requires_grad=False, module=new, **storage
        )
    else:
        storage = {"has_fp16_weights": False}
        new = bitsandbytes.nn.Linear8bitLt(*shape, bias=bias, device="meta", **storage)
        new.weight = bitsandbytes.nn.Int8Params(layer.weight.data, requires_grad=False, **storage)
    new.bias = layer.bias
    return new.requires_grad_(False)

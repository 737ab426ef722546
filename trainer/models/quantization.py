"""The frozen denoiser in 4 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314) or in 8 (LLM.int8(), arXiv:2208.07339)."""

import logging
from typing import Any

import torch
from torch import nn

from trainer.errors import ConfigError


def quantize(denoiser: nn.Module, how: str, dtype: torch.dtype, device: torch.device) -> None:
    """Replaces the linear layers by ones of 8 or 4 bits, which round their weights when they are moved to the device.

    Convolutions, norms and the text encoders stay as they are: bitsandbytes has no convolutions, and a frozen text encoder is off the
    device while training. Raises ConfigError where bitsandbytes is missing or does not work on this device.
    """
    bitsandbytes = working(how, dtype, device)
    for name, layer in list(denoiser.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(
                denoiser.get_submodule(parent), child, _rounded(bitsandbytes, layer, how, dtype)
            )
    setattr(denoiser, f"is_loaded_in_{how}", True)  # by which PEFT knows what it puts an adapter on


def _rounded(bitsandbytes: Any, layer: nn.Linear, how: str, dtype: torch.dtype) -> nn.Module:
    shape, bias = (layer.in_features, layer.out_features), layer.bias is not None
    if how == "4bit":
        new = bitsandbytes.nn.Linear4bit(
            *shape,
            bias=bias,
            compute_dtype=dtype,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        new.weight = bitsandbytes.nn.Params4bit(
            layer.weight.data,
            requires_grad=False,
            compress_statistics=True,
            quant_type="nf4",
            module=new,
        )
    else:
        new = bitsandbytes.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False, device="meta")
        new.weight = bitsandbytes.nn.Int8Params(
            layer.weight.data, requires_grad=False, has_fp16_weights=False
        )
    new.bias = layer.bias
    return new.requires_grad_(False)


def working(how: str, dtype: torch.dtype, device: torch.device) -> Any:
    """bitsandbytes, after one layer was run forward and backward on the device. Raises ConfigError where that does not work."""
    if device.type != "cuda":
        raise ConfigError(
            f"base.quantization = {how} needs an NVIDIA GPU, and the device here is {device.type}; set it to none."
        )
    try:
        import bitsandbytes

        logging.getLogger("bitsandbytes").setLevel(
            logging.ERROR
        )  # it would tell at every layer that it works in fp16
        layer = _rounded(bitsandbytes, nn.Linear(64, 64), how, dtype).to(device)
        inputs = torch.ones(2, 64, dtype=dtype, device=device, requires_grad=True)
        layer(inputs).float().sum().backward()
        if inputs.grad is not None and torch.isfinite(inputs.grad).all():
            return bitsandbytes
        reason = "it gives no gradients"
    except (
        ImportError,
        OSError,
        RuntimeError,
        NotImplementedError,
        AttributeError,
        ValueError,
        AssertionError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
    raise ConfigError(
        f"base.quantization = {how} needs the bitsandbytes package with a GPU it knows, and does not work here ({reason}). "
        "Install the extra with `pip install lora-atelier[bitsandbytes]`, or set base.quantization = none."
    ) from None

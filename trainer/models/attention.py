"""Which attention runs on this device: found out by running it forward and backward, not by importing it.

An xformers built for another torch imports well and fails, or gives wrong gradients, when used.
"""

import time
from collections.abc import Callable

import torch
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
)
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # [B, heads, tokens, head size] each
# In the place of any other diffusers puts a plain one of xformers, which leaves out what it does besides.
TAKEN_OVER = (AttnProcessor, AttnProcessor2_0, JointAttnProcessor2_0)
TRIAL_SIZE, TRIAL_REPEATS = (2, 8, 1024, 40), 10  # the attention of SD 1.5 at 256 px


def _xformers() -> Attention:
    from xformers.ops import memory_efficient_attention

    return lambda q, k, v: memory_efficient_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    ).transpose(1, 2)


def choose_attention(
    denoiser: nn.Module, device: torch.device, dtype: torch.dtype
) -> tuple[str, str]:
    """The faster working one of "torch" and "xformers", and a sentence that says why."""
    if device.type != "cuda":
        return "torch", "torch's attention (xformers needs CUDA)"
    if not all(
        isinstance(processor, TAKEN_OVER) for processor in denoiser.attn_processors.values()
    ):
        return "torch", "torch's attention (xformers has no form of this denoiser's)"
    try:
        xformers = _xformers()
        error = _gradient_error(xformers, device, dtype)
        if not error < 0.02:
            return (
                "torch",
                f"torch's attention (the gradients of xformers are off by {error:.2g} on this device)",
            )
        theirs, ours = (
            _seconds(xformers, device, dtype),
            _seconds(scaled_dot_product_attention, device, dtype),
        )
    except ImportError:
        return "torch", "torch's attention (xformers is not installed)"
    except (RuntimeError, NotImplementedError, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return "torch", f"torch's attention (xformers does not work here: {reason[:100]})"
    name = "xformers" if theirs < ours else "torch"
    return (
        name,
        f"{name} (forward and backward: xformers {theirs * 1e3:.2f} ms, torch {ours * 1e3:.2f} ms)",
    )


def use_attention(denoiser: nn.Module, name: str) -> None:
    """Torch's attention is what diffusers uses by itself."""
    if name == "xformers":
        denoiser.enable_xformers_memory_efficient_attention()


def _inputs(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    return [
        torch.randn(TRIAL_SIZE, generator=generator).to(device, dtype).requires_grad_()
        for _ in range(3)
    ]


def _run(attention: Attention, inputs: list[Tensor]) -> list[Tensor]:
    output = attention(*inputs)
    return [output.detach(), *torch.autograd.grad(output.float().square().sum(), inputs)]


def _gradient_error(attention: Attention, device: torch.device, dtype: torch.dtype) -> float:
    """Largest relative difference of output and gradients from torch's attention in float32."""
    inputs = _inputs(device, dtype)
    exact = _run(
        scaled_dot_product_attention, [x.detach().float().requires_grad_() for x in inputs]
    )
    return max(
        float((a.float() - b).norm() / b.norm())
        for a, b in zip(_run(attention, inputs), exact, strict=True)
    )


def _seconds(attention: Attention, device: torch.device, dtype: torch.dtype) -> float:
    inputs = _inputs(device, dtype)
    for _ in range(3):
        _run(attention, inputs)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(TRIAL_REPEATS):
        _run(attention, inputs)
    torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / TRIAL_REPEATS

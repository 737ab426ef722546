"""Chooses the attention kernel by running it forward and backward on this device.

Importing it is not enough: an xformers that was built for another torch imports without an error,
then fails or gives wrong gradients.
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

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Query, key and value to output; each is [B, heads, tokens, head size]."""

REPLACEABLE = (AttnProcessor, AttnProcessor2_0, JointAttnProcessor2_0)
"""Processors with an equivalent for xformers. Diffusers would replace any other by a plain one,
which lacks what the other does besides."""

TRIAL_SIZE = (2, 8, 1024, 40)  # the attention of Stable Diffusion 1.5 at 256 px
TRIAL_REPEATS = 10
MAX_GRADIENT_ERROR = 0.02  # relative; the rounding of fp16 is well below it


def choose_attention(
    denoiser: nn.Module, device: torch.device, dtype: torch.dtype
) -> tuple[str, str]:
    """Returns the faster of "torch" and "xformers" that works, and the reason for the choice."""
    if device.type != "cuda":
        return "torch", "torch's attention (xformers needs CUDA)"
    processors = denoiser.attn_processors.values()
    if not all(isinstance(processor, REPLACEABLE) for processor in processors):
        return "torch", "torch's attention (xformers has no equivalent of this denoiser's)"
    try:
        xformers = _xformers()
        error = _gradient_error(xformers, device, dtype)
        if not error < MAX_GRADIENT_ERROR:  # also if it is NaN
            return "torch", (
                f"torch's attention (xformers' gradients are off by {error:.2g} on this device)"
            )
        xformers_seconds = _seconds(xformers, device, dtype)
        torch_seconds = _seconds(scaled_dot_product_attention, device, dtype)
    except ImportError:
        return "torch", "torch's attention (xformers is not installed)"
    except (RuntimeError, NotImplementedError, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return "torch", f"torch's attention (xformers does not work here: {reason[:100]})"
    name = "xformers" if xformers_seconds < torch_seconds else "torch"
    return name, (
        f"{name} (forward and backward: xformers {xformers_seconds * 1e3:.2f} ms, "
        f"torch {torch_seconds * 1e3:.2f} ms)"
    )


def use_attention(denoiser: nn.Module, name: str) -> None:
    """Switches the denoiser to "xformers"; "torch" is the default of diffusers."""
    if name == "xformers":
        denoiser.enable_xformers_memory_efficient_attention()


def _xformers() -> Attention:
    from xformers.ops import memory_efficient_attention

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # xformers expects [B, tokens, heads, head size].
        return memory_efficient_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        ).transpose(1, 2)

    return attention


def _inputs(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Returns random query, key and value of TRIAL_SIZE, the same at every call."""
    generator = torch.Generator("cpu").manual_seed(0)
    return [
        torch.randn(TRIAL_SIZE, generator=generator).to(device, dtype).requires_grad_()
        for _ in range(3)
    ]


def _run(attention: Attention, inputs: list[Tensor]) -> list[Tensor]:
    """Returns the output and the gradients of the three inputs."""
    output = attention(*inputs)
    return [output.detach(), *torch.autograd.grad(output.float().square().sum(), inputs)]


def _gradient_error(attention: Attention, device: torch.device, dtype: torch.dtype) -> float:
    """Returns the largest relative error of output and gradients.

    The reference is torch's attention in float32.
    """
    inputs = _inputs(device, dtype)
    exact_inputs = [x.detach().float().requires_grad_() for x in inputs]
    exact = _run(scaled_dot_product_attention, exact_inputs)
    results = _run(attention, inputs)
    return max(
        float((result.float() - reference).norm() / reference.norm())
        for result, reference in zip(results, exact, strict=True)
    )


def _seconds(attention: Attention, device: torch.device, dtype: torch.dtype) -> float:
    """Returns the mean time of one forward and backward pass, in seconds."""
    inputs = _inputs(device, dtype)
    for _ in range(3):  # the first runs also load and choose kernels
        _run(attention, inputs)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(TRIAL_REPEATS):
        _run(attention, inputs)
    torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / TRIAL_REPEATS

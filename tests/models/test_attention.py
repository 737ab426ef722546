"""The choice of the attention kernel.

The tests run without CUDA: functions on the CPU replace the kernel of xformers.
"""

import pytest
import torch
from diffusers import AuraFlowTransformer2DModel
from torch.nn.functional import scaled_dot_product_attention

from tests.tiny import tiny_unet
from trainer.models import attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_torch_is_used_on_a_cpu():
    assert attention.choose_attention(tiny_unet(), CPU, torch.float32) == (
        "torch",
        "torch's attention (xformers needs CUDA)",
    )


@pytest.fixture
def pretend_cuda(monkeypatch):
    """Returns a function that chooses as on CUDA, with tensors on the CPU and given timings.

    `seconds` contains the time of the kernel under True and of torch under False.
    """
    real_inputs = attention._inputs
    monkeypatch.setattr(attention, "TRIAL_SIZE", (1, 2, 16, 8))
    monkeypatch.setattr(attention, "_inputs", lambda device, dtype: real_inputs(CPU, torch.float32))

    def choose(kernel, seconds):
        monkeypatch.setattr(attention, "_xformers", lambda: kernel)
        monkeypatch.setattr(
            attention, "_seconds", lambda tried, device, dtype: seconds[tried is kernel]
        )
        return attention.choose_attention(tiny_unet(), CUDA, torch.float16)

    return choose


def correct_kernel(q, k, v):
    return scaled_dot_product_attention(q, k, v) * 1.0


def test_the_faster_kernel_is_used_and_both_times_are_reported(pretend_cuda):
    name, reason = pretend_cuda(correct_kernel, {True: 0.001, False: 0.002})
    assert name == "xformers"
    assert "xformers 1.00 ms" in reason and "torch 2.00 ms" in reason
    assert pretend_cuda(correct_kernel, {True: 0.002, False: 0.001})[0] == "torch"


def kernel_with_wrong_gradients(q, k, v):
    return correct_kernel(q.detach(), k, v) + 0 * q


def kernel_that_gives_nan(q, k, v):
    return correct_kernel(q, k, v) * float("nan")


def kernel_that_fails(q, k, v):
    raise NotImplementedError("No operator found\nfor this device")


@pytest.mark.parametrize(
    "kernel, words",
    [
        (kernel_with_wrong_gradients, "xformers' gradients are off by"),
        (kernel_that_gives_nan, "xformers' gradients are off by nan"),
        (kernel_that_fails, "No operator found"),
    ],
)
def test_a_faster_kernel_that_is_wrong_or_fails_is_not_used(pretend_cuda, kernel, words):
    name, reason = pretend_cuda(kernel, {True: 0.001, False: 1.0})
    assert name == "torch" and words in reason


def test_a_denoiser_with_another_kind_of_attention_keeps_it():
    """Diffusers would replace its attention over image and text by one over the image, and fail."""
    shape = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": 16,
        "caption_projection_dim": 16,
    }
    denoiser = AuraFlowTransformer2DModel(
        sample_size=8, num_mmdit_layers=1, num_single_dit_layers=0, pos_embed_max_size=16, **shape
    )
    assert attention.choose_attention(denoiser, CUDA, torch.float16) == (
        "torch",
        "torch's attention (xformers has no equivalent of this denoiser's)",
    )


def test_torch_is_used_if_xformers_is_not_installed(monkeypatch):
    def missing():
        raise ImportError

    monkeypatch.setattr(attention, "_xformers", missing)
    assert "not installed" in attention.choose_attention(tiny_unet(), CUDA, torch.float16)[1]

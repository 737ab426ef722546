"""Attention is chosen by running it. CUDA is not here, so its choices are tried with stand-ins for the kernel on the CPU."""

import pytest
import torch
from diffusers import AuraFlowTransformer2DModel
from torch.nn.functional import scaled_dot_product_attention

from tests.tiny import tiny_unet
from trainer.models import attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_cpu_uses_torch():
    assert attention.choose_attention(tiny_unet(), CPU, torch.float32) == (
        "torch",
        "torch's attention (xformers needs CUDA)",
    )


@pytest.fixture
def pretend_cuda(monkeypatch):
    """The trial as on CUDA, its tensors on the CPU, its clock scripted."""
    real = attention._inputs
    monkeypatch.setattr(attention, "TRIAL_SIZE", (1, 2, 16, 8))
    monkeypatch.setattr(attention, "_inputs", lambda device, dtype: real(CPU, torch.float32))

    def use(kernel, seconds):
        monkeypatch.setattr(attention, "_xformers", lambda: kernel)
        monkeypatch.setattr(attention, "_seconds", lambda a, device, dtype: seconds[a is kernel])
        return attention.choose_attention(tiny_unet(), CUDA, torch.float16)

    return use


def right(q, k, v):
    return scaled_dot_product_attention(q, k, v) * 1.0


def test_the_faster_of_two_working_ones_is_used_and_shown(pretend_cuda):
    name, why = pretend_cuda(right, {True: 0.001, False: 0.002})
    assert name == "xformers" and "1.00 ms" in why and "2.00 ms" in why
    assert pretend_cuda(right, {True: 0.002, False: 0.001})[0] == "torch"


def detached(q, k, v):
    return right(q.detach(), k, v) + 0 * q


def raising(q, k, v):
    raise NotImplementedError("No operator found\nfor this device")


@pytest.mark.parametrize(
    "kernel, words",
    [
        (detached, "gradients of xformers are off"),
        (raising, "No operator found"),
        (lambda q, k, v: right(q, k, v) * float("nan"), "gradients of xformers"),
    ],
)
def test_one_that_is_wrong_or_fails_is_not_used(pretend_cuda, kernel, words):
    name, why = pretend_cuda(kernel, {True: 0.001, False: 1.0})
    assert name == "torch" and words in why


def test_a_denoiser_with_an_attention_of_its_own_keeps_it():
    """Diffusers would put one over the pictures alone in the place of this one over pictures and text, and fail."""
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
        "torch's attention (xformers has no form of this denoiser's)",
    )


def test_without_xformers_torch_is_used(monkeypatch):
    def missing():
        raise ImportError

    monkeypatch.setattr(attention, "_xformers", missing)
    assert "not installed" in attention.choose_attention(tiny_unet(), CUDA, torch.float16)[1]

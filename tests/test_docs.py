"""Numbers in docs/lora.md, counted anew on models built from the public configurations."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from trainer import config, estimate, targets
from trainer.safetensors_header import TensorInfo

PAGE = (Path(__file__).parent.parent / "docs" / "lora.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def sd15():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, cross_attention_dim=768, attention_head_dim=8
        )
        encoder = CLIPTextModel(
            CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
    return unet, encoder


def tensors(module):
    return {name: TensorInfo("F16", tuple(p.shape)) for name, p in module.named_parameters()}


def counted(part, module, rank):
    return estimate.adapter_parameters(config.Adapter(rank=rank, alpha=rank), part, tensors(module))


def test_the_models_have_the_size_that_is_told(sd15):
    for module in sd15:
        assert f"{sum(p.numel() for p in module.parameters()):,}" in PAGE


@pytest.mark.parametrize("rank", [4, 8, 16, 32])
def test_parameters_and_file_sizes_of_the_table(sd15, rank):
    unet, both = counted("unet", sd15[0], rank), counted("unet", sd15[0], rank) + counted("text_encoder", sd15[1], rank)
    share = unet / sum(p.numel() for p in sd15[0].parameters())
    row = f"| {rank} | {unet:,} | {share:.3%} | {both:,} | {both * 2 / 1e6:.1f} MB |".replace("%", " %")
    assert row in PAGE


def test_the_count_of_adapted_projections(sd15):
    parts = zip(("unet", "text_encoder"), sd15, strict=True)
    counts = [len(targets.choose_targets(config.Adapter(), part, targets.projections(tensors(module)))) for part, module in parts]
    assert counts == [128, 48] and "128 of them" in PAGE and "48 in its text encoder" in PAGE

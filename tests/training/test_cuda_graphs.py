"""Recorded steps give the gradients of those that are launched one operation at a time."""

import pytest
import torch

from tests import tiny
from trainer.config import Adapter
from trainer.families import FAMILIES
from trainer.families.base import Batch
from trainer.families.objective import Noised
from trainer.lora import inject
from trainer.training.step.cuda_graphs import GraphedPredict

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="CUDA graphs need an NVIDIA GPU"
)


def gradients(predict, denoiser, sides) -> list[torch.Tensor]:
    """Of microbatches of several shapes, summed up as gradient accumulation does."""
    denoiser.zero_grad(set_to_none=False)
    draws = torch.Generator().manual_seed(3)
    for side in sides:
        latents, text = (
            torch.randn(size, generator=draws).cuda() for size in ((2, 4, side, side), (2, 77, 32))
        )
        timesteps = torch.tensor([3, 7]).cuda()
        predict(
            Noised(latents, timesteps, latents),
            Batch(latents, {"prompt_embeds": text}, torch.zeros(2, 6).cuda()),
        ).square().mean().backward()
    return [p.grad.clone() for p in denoiser.parameters() if p.requires_grad]


def test_replayed_graphs_accumulate_the_gradients_of_eager_steps():
    family, unet = FAMILIES["sd1"], tiny.tiny_unet().cuda().requires_grad_(False)
    inject.inject(unet, "unet", Adapter(rank=2, init="orthogonal"), seed=0)
    predict = GraphedPredict(family, unet)
    sides = (8, 8, 16, 16, 8, 16, 8)
    gradients(predict, unet, sides)
    assert len(predict.graphs) == 2 and not predict.refusal
    replayed = gradients(predict, unet, sides)
    eager = gradients(lambda noised, batch: family.predict(unet, noised, batch), unet, sides)
    for a, b in zip(replayed, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_second_forward_before_the_backward_runs_without_a_graph():
    family, unet = FAMILIES["sd1"], tiny.tiny_unet().cuda().requires_grad_(False)
    inject.inject(unet, "unet", Adapter(rank=2, init="orthogonal"), seed=0)
    predict = GraphedPredict(family, unet)
    gradients(predict, unet, (8, 8, 8))
    twice = lambda noised, batch: predict(noised, batch) + predict(noised, batch)  # noqa: E731
    both = gradients(twice, unet, (8,))
    eager = gradients(lambda noised, batch: 2 * family.predict(unet, noised, batch), unet, (8,))
    for a, b in zip(both, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

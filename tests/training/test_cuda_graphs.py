"""Steps that are replayed as CUDA graphs give the gradients of eager steps."""

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


@pytest.fixture
def unet():
    unet = tiny.tiny_unet().cuda().requires_grad_(False)
    inject.inject(unet, "unet", Adapter(rank=2, init="orthogonal"), seed=0)
    return unet


def gradients(predict, denoiser, sides) -> list[torch.Tensor]:
    """Accumulates gradients over microbatches with latents of several sides."""
    denoiser.zero_grad(set_to_none=False)
    draws = torch.Generator().manual_seed(3)
    for side in sides:
        latents = torch.randn(2, 4, side, side, generator=draws).cuda()
        text = torch.randn(2, 77, 32, generator=draws).cuda()
        timesteps = torch.tensor([3, 7]).cuda()
        noised = Noised(latents, timesteps, latents)
        batch = Batch(latents, {"prompt_embeds": text}, torch.zeros(2, 6).cuda())
        predict(noised, batch).square().mean().backward()
    return [p.grad.clone() for p in denoiser.parameters() if p.requires_grad]


def assert_close(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_replayed_graphs_accumulate_the_gradients_of_eager_steps(unet):
    family, sides = FAMILIES["sd1"], (8, 8, 16, 16, 8, 16, 8)
    predict = GraphedPredict(family, unet)
    gradients(predict, unet, sides)
    assert len(predict.graphs) == 2
    assert not predict.refusal
    replayed = gradients(predict, unet, sides)
    eager = gradients(lambda noised, batch: family.predict(unet, noised, batch), unet, sides)
    assert_close(replayed, eager)


def test_a_second_forward_before_the_backward_runs_without_a_graph(unet):
    family = FAMILIES["sd1"]
    predict = GraphedPredict(family, unet)
    gradients(predict, unet, (8, 8, 8))

    def twice(noised, batch):
        return predict(noised, batch) + predict(noised, batch)

    def twice_eager(noised, batch):
        return 2 * family.predict(unet, noised, batch)

    assert_close(gradients(twice, unet, (8,)), gradients(twice_eager, unet, (8,)))

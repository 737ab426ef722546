"""The objective against diffusers' own formulas and worked numbers."""

import pytest
import torch
from diffusers import DDPMScheduler, EDMDPMSolverMultistepScheduler
from diffusers.training_utils import compute_snr

from trainer.errors import ModelError
from trainer.objective import DiffusionObjective, min_snr_weights, offset_noise

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(params=["epsilon", "v_prediction"])
def scheduler(request):
    return DDPMScheduler(prediction_type=request.param, **SCHEDULE)


def test_noise_target_and_snr_are_those_of_diffusers(scheduler):
    objective = DiffusionObjective.from_scheduler(scheduler)
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 5, 4, 3, 3, generator=generator)
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    noised = objective.noised(latents, noise, timesteps)
    torch.testing.assert_close(noised.noisy_latents, scheduler.add_noise(latents, noise, timesteps))
    expected = noise if scheduler.config.prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(noised.target, expected)
    ratio = objective.alphas_cumprod[timesteps] / (1 - objective.alphas_cumprod[timesteps])
    torch.testing.assert_close(ratio, compute_snr(scheduler, timesteps))


def test_the_loss_is_the_weighted_error_of_the_diffusers_examples(scheduler):
    """The formula of diffusers' train_text_to_image_lora.py, written out."""
    objective = DiffusionObjective.from_scheduler(scheduler)
    generator = torch.Generator().manual_seed(1)
    latents, noise, model_pred = torch.randn(3, 6, 4, 2, 2, generator=generator)
    timesteps = torch.randint(0, 1000, (6,), generator=generator)
    noised = objective.noised(latents, noise, timesteps)
    snr = compute_snr(scheduler, timesteps)
    weights = torch.stack([snr, 5.0 * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    weights = weights / snr if scheduler.config.prediction_type == "epsilon" else weights / (snr + 1)
    expected = torch.nn.functional.mse_loss(model_pred, noised.target, reduction="none").mean(dim=(1, 2, 3)) * weights
    torch.testing.assert_close(objective.loss(model_pred, noised, 5.0), expected)
    torch.testing.assert_close(objective.loss(model_pred, noised, 0.0), (model_pred - noised.target).square().mean(dim=(1, 2, 3)))


def test_min_snr_on_worked_numbers():
    ratio = torch.tensor([0.5, 5.0, 20.0])
    torch.testing.assert_close(min_snr_weights(ratio, 5.0, "epsilon"), torch.tensor([1.0, 1.0, 0.25]))
    torch.testing.assert_close(min_snr_weights(ratio, 5.0, "v_prediction"), torch.tensor([0.5 / 1.5, 5 / 6, 5 / 21]))


def test_offset_noise_moves_whole_channels():
    noise = torch.zeros(2, 4, 8, 8)
    moved = offset_noise(noise, 0.1, torch.Generator().manual_seed(0))
    assert moved.std(dim=(2, 3)).max() == 0 and moved.mean(dim=(2, 3)).unique().numel() == 8
    assert offset_noise(noise, 0.0, torch.Generator()) is noise


def test_an_unknown_prediction_is_refused():
    with pytest.raises(ModelError, match="sample"):
        DiffusionObjective.from_scheduler(DDPMScheduler(prediction_type="sample"))
    with pytest.raises(ModelError, match="EDMDPM"):
        DiffusionObjective.from_scheduler(EDMDPMSolverMultistepScheduler())

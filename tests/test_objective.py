"""The objective against diffusers' own formulas and worked numbers."""

import pytest
import torch
from diffusers import DDPMScheduler, EDMDPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3, compute_snr

from trainer.errors import ModelError
from trainer.objective import TIMESTEP_SAMPLING, DiffusionObjective, FlowMatchingObjective, min_snr_weights, offset_noise

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


EVEN = (torch.arange(20_000) + 0.5) / 20_000


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("scheme", ["logit_normal", "mode", "uniform"])
def test_flow_matching_is_that_of_diffusers_own_example(shift, scheme):
    """The formula of diffusers' train_dreambooth_lora_sd3.py, written out: its index counts from the noise, our place from the picture."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    objective = FlowMatchingObjective.from_scheduler(scheduler)
    generator = torch.Generator().manual_seed(2)
    latents, noise, model_pred = torch.randn(3, 6, 16, 4, 4, generator=generator)
    u = torch.tensor([0.0, 0.1, 0.4999, 0.7, 0.99, 0.9999])
    timesteps = scheduler.timesteps[(u * scheduler.config.num_train_timesteps).long()]
    sigmas = torch.stack([scheduler.sigmas[scheduler.timesteps == t][0] for t in timesteps]).view(-1, 1, 1, 1)
    noised = objective.noised(latents, noise, objective.timesteps(1 - u - 1e-5))
    torch.testing.assert_close(noised.timesteps, timesteps)
    torch.testing.assert_close(noised.noisy_latents, (1 - sigmas) * latents + sigmas * noise)
    torch.testing.assert_close(noised.noisy_latents, scheduler.scale_noise(latents, timesteps, noise))
    weighting = compute_loss_weighting_for_sd3(scheme, sigmas)
    expected = (weighting.float() * (model_pred - (noise - latents)) ** 2).reshape(6, -1).mean(1)
    torch.testing.assert_close(objective.loss(model_pred, noised, 5.0), expected)


@pytest.mark.parametrize("scheme", ["logit_normal", "mode", "uniform"])
def test_timesteps_are_sampled_as_densely_as_by_diffusers(scheme):
    """Deciles of our evenly spread draws against 200,000 of theirs."""
    torch.manual_seed(0)
    theirs = compute_density_for_timestep_sampling(scheme, 200_000, logit_mean=0.0, logit_std=1.0, mode_scale=1.29)
    deciles = torch.arange(1, 10) / 10
    torch.testing.assert_close(TIMESTEP_SAMPLING[scheme](EVEN).quantile(deciles), theirs.quantile(deciles), rtol=0, atol=5e-3)


def test_cosmap_samples_as_densely_as_its_weight_is_large():
    """Diffusers weighs uniform timesteps by 2 / (pi (1 - 2 t + 2 t^2)) instead (Esser et al. 2024, section 3.1): the same mean of any f(t)."""
    weights = compute_loss_weighting_for_sd3("cosmap", EVEN)
    for f in (torch.ones_like, torch.sqrt, torch.cos):
        torch.testing.assert_close(f(TIMESTEP_SAMPLING["cosmap"](EVEN)).mean(), (weights * f(EVEN)).mean(), rtol=0, atol=1e-3)


def test_flow_matching_on_worked_numbers():
    """A shift of 3 takes the half to 3 * 0.5 / (1 + 2 * 0.5) = 0.75."""
    objective = FlowMatchingObjective.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert objective.timesteps(torch.tensor([0.4999, 0.9999, 1.0])).tolist() == [750.0, 1000.0, 1000.0]
    one, two = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2.0)
    noised = objective.noised(one, two, torch.tensor([750.0]))
    assert (float(noised.noisy_latents), float(noised.target)) == (1.75, 1.0)
    assert float(objective.loss(two, noised, 5.0)) == 1.0 and objective.prediction_type == "flow"


def test_places_of_diffusion_are_whole_timesteps(scheduler):
    objective = DiffusionObjective.from_scheduler(scheduler)
    assert objective.timesteps(torch.tensor([0.0, 0.0009, 0.5, 0.9999, 1.0])).tolist() == [0, 0, 500, 999, 999]
    for sample in TIMESTEP_SAMPLING.values():
        assert 0 <= objective.timesteps(sample(EVEN)).min() and objective.timesteps(sample(EVEN)).max() <= 999


def test_a_schedule_of_another_kind_is_no_flow():
    with pytest.raises(ModelError, match="DDPMScheduler.*not one of flow matching"):
        FlowMatchingObjective.from_scheduler(DDPMScheduler())

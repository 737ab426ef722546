"""The objectives compared with the formulas of diffusers and with worked numbers."""

import pytest
import torch
from diffusers import DDPMScheduler, EDMDPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)

from trainer import config
from trainer.errors import ConfigError, ModelError
from trainer.families.objective import (
    TIMESTEP_SAMPLING,
    DiffusionObjective,
    FlowMatchingObjective,
    Noised,
    debiased_weights,
    image_losses,
    min_snr_weights,
    offset_noise,
    p2_weights,
    pointwise_error,
    pyramid_noise,
    sample_positions,
)
from trainer.runs import run_folder, run_status
from trainer.training.runner import run_in
from trainer.training.step.losses import _noised, microbatch_losses

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DEFAULT = config.Objective()
UNWEIGHTED = config.Objective(min_snr_gamma=0.0)


@pytest.fixture(params=["epsilon", "v_prediction"])
def scheduler(request):
    return DDPMScheduler(prediction_type=request.param, **SCHEDULE)


def test_noise_target_and_snr_equal_diffusers(scheduler):
    objective = DiffusionObjective.from_scheduler(scheduler)
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 5, 4, 3, 3, generator=generator)
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    noised = objective.noised(latents, noise, timesteps)
    torch.testing.assert_close(noised.noisy_latents, scheduler.add_noise(latents, noise, timesteps))
    expected = (
        noise
        if scheduler.config.prediction_type == "epsilon"
        else scheduler.get_velocity(latents, noise, timesteps)
    )
    torch.testing.assert_close(noised.target, expected)
    torch.testing.assert_close(objective.snr(timesteps), compute_snr(scheduler, timesteps))


def test_the_loss_equals_the_training_example_of_diffusers(scheduler):
    """The expected loss is the formula in train_text_to_image_lora.py."""
    objective = DiffusionObjective.from_scheduler(scheduler)
    generator = torch.Generator().manual_seed(1)
    latents, noise, model_pred = torch.randn(3, 6, 4, 2, 2, generator=generator)
    timesteps = torch.randint(0, 1000, (6,), generator=generator)
    noised = objective.noised(latents, noise, timesteps)
    snr = compute_snr(scheduler, timesteps)
    weights = torch.stack([snr, 5.0 * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    weights = (
        weights / snr if scheduler.config.prediction_type == "epsilon" else weights / (snr + 1)
    )
    error = torch.nn.functional.mse_loss(model_pred, noised.target, reduction="none")
    mean = error.mean(dim=(1, 2, 3))
    torch.testing.assert_close(image_losses(objective, model_pred, noised, DEFAULT), mean * weights)
    torch.testing.assert_close(image_losses(objective, model_pred, noised, UNWEIGHTED), mean)


def test_min_snr_on_worked_numbers():
    ratio = torch.tensor([0.5, 5.0, 20.0])
    torch.testing.assert_close(
        min_snr_weights(ratio, 5.0, "epsilon"), torch.tensor([1.0, 1.0, 0.25])
    )
    torch.testing.assert_close(
        min_snr_weights(ratio, 5.0, "v_prediction"), torch.tensor([0.5 / 1.5, 5 / 6, 5 / 21])
    )


def test_offset_noise_shifts_whole_channels():
    noise = torch.zeros(2, 4, 8, 8)
    shifted = offset_noise(noise, 0.1, torch.Generator().manual_seed(0))
    assert shifted.std(dim=(2, 3)).max() == 0
    assert shifted.mean(dim=(2, 3)).unique().numel() == 8
    assert offset_noise(noise, 0.0, torch.Generator()) is noise


def test_other_prediction_types_and_schedules_are_refused():
    with pytest.raises(ModelError, match="sample"):
        DiffusionObjective.from_scheduler(DDPMScheduler(prediction_type="sample"))
    with pytest.raises(ModelError, match="EDMDPM"):
        DiffusionObjective.from_scheduler(EDMDPMSolverMultistepScheduler())


EVEN = (torch.arange(20_000) + 0.5) / 20_000


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("scheme", ["logit_normal", "mode", "uniform"])
def test_flow_matching_equals_the_training_example_of_diffusers(shift, scheme):
    """The expected loss is the formula in train_dreambooth_lora_sd3.py.

    Its index counts from the noise, and a position here from the image.
    """
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    objective = FlowMatchingObjective.from_scheduler(scheduler)
    generator = torch.Generator().manual_seed(2)
    latents, noise, model_pred = torch.randn(3, 6, 16, 4, 4, generator=generator)
    u = torch.tensor([0.0, 0.1, 0.4999, 0.7, 0.99, 0.9999])
    timesteps = scheduler.timesteps[(u * scheduler.config.num_train_timesteps).long()]
    sigmas = torch.stack([scheduler.sigmas[scheduler.timesteps == t][0] for t in timesteps]).view(
        -1, 1, 1, 1
    )
    noised = objective.noised(latents, noise, objective.timesteps(1 - u - 1e-5))
    torch.testing.assert_close(noised.timesteps, timesteps)
    torch.testing.assert_close(noised.noisy_latents, (1 - sigmas) * latents + sigmas * noise)
    torch.testing.assert_close(
        noised.noisy_latents, scheduler.scale_noise(latents, timesteps, noise)
    )
    weighting = compute_loss_weighting_for_sd3(scheme, sigmas)
    expected = (weighting.float() * (model_pred - (noise - latents)) ** 2).reshape(6, -1).mean(1)
    torch.testing.assert_close(image_losses(objective, model_pred, noised, DEFAULT), expected)


@pytest.mark.parametrize("scheme", ["logit_normal", "mode", "uniform"])
def test_timestep_densities_equal_diffusers(scheme):
    """Compares the deciles of evenly spread positions with 200,000 random ones of diffusers."""
    torch.manual_seed(0)
    reference = compute_density_for_timestep_sampling(
        scheme, 200_000, logit_mean=0.0, logit_std=1.0, mode_scale=1.29
    )
    deciles = torch.arange(1, 10) / 10
    torch.testing.assert_close(
        TIMESTEP_SAMPLING[scheme](EVEN, DEFAULT).quantile(deciles),
        reference.quantile(deciles),
        rtol=0,
        atol=5e-3,
    )


def test_cosmap_has_the_density_that_diffusers_uses_as_a_weight():
    """Diffusers weights uniform timesteps by 2 / (pi (1 - 2 t + 2 t^2)) (Esser et al. 2024, 3.1).

    So the mean of any f(t) is the same.
    """
    weights = compute_loss_weighting_for_sd3("cosmap", EVEN)
    for f in (torch.ones_like, torch.sqrt, torch.cos):
        torch.testing.assert_close(
            f(TIMESTEP_SAMPLING["cosmap"](EVEN, DEFAULT)).mean(),
            (weights * f(EVEN)).mean(),
            rtol=0,
            atol=1e-3,
        )


def test_flow_matching_on_worked_numbers():
    """A shift of 3 moves 0.5 to 3 * 0.5 / (1 + 2 * 0.5) = 0.75."""
    objective = FlowMatchingObjective.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert objective.timesteps(torch.tensor([0.4999, 0.9999, 1.0])).tolist() == [
        750.0,
        1000.0,
        1000.0,
    ]
    one, two = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2.0)
    noised = objective.noised(one, two, torch.tensor([750.0]))
    assert (float(noised.noisy_latents), float(noised.target)) == (1.75, 1.0)
    assert (
        float(image_losses(objective, two, noised, DEFAULT)) == 1.0
        and objective.prediction_type == "flow"
    )


def test_timesteps_of_diffusion_are_whole_numbers_in_range(scheduler):
    objective = DiffusionObjective.from_scheduler(scheduler)
    assert objective.timesteps(torch.tensor([0.0, 0.0009, 0.5, 0.9999, 1.0])).tolist() == [
        0,
        0,
        500,
        999,
        999,
    ]
    for sample in TIMESTEP_SAMPLING.values():
        timesteps = objective.timesteps(sample(EVEN, DEFAULT))
        assert timesteps.min() >= 0 and timesteps.max() <= 999


def test_flow_matching_refuses_a_diffusion_schedule():
    with pytest.raises(ModelError, match="DDPMScheduler.*not one of flow matching"):
        FlowMatchingObjective.from_scheduler(DDPMScheduler())


# Weights


def test_debiased_and_p2_on_worked_numbers():
    ratio = torch.tensor([0.25, 1.0, 4.0])
    torch.testing.assert_close(debiased_weights(ratio, "epsilon"), torch.tensor([2.0, 1.0, 0.5]))
    torch.testing.assert_close(
        debiased_weights(ratio, "v_prediction"), torch.tensor([0.4, 0.5, 0.4])
    )  # sqrt(SNR) / (SNR + 1)
    torch.testing.assert_close(p2_weights(ratio, 1.0, "epsilon"), torch.tensor([0.8, 0.5, 0.2]))
    torch.testing.assert_close(p2_weights(ratio, 0.5, "v_prediction"), ratio * (1 + ratio) ** -1.5)


@pytest.mark.parametrize("weighting", ["min_snr", "debiased", "p2"])
def test_a_weighting_means_the_same_for_epsilon_and_v(weighting):
    """The same prediction has the same loss, expressed as epsilon or as v."""
    noises, vs = (
        DiffusionObjective.from_scheduler(DDPMScheduler(prediction_type=kind, **SCHEDULE))
        for kind in ("epsilon", "v_prediction")
    )
    generator = torch.Generator().manual_seed(3)
    latents, noise, guess = torch.randn(3, 5, 4, 2, 2, generator=generator)
    timesteps = torch.tensor([10, 200, 500, 800, 990])
    as_noise, as_v = noises.noised(latents, noise, timesteps), vs.noised(latents, noise, timesteps)
    alpha_bar = noises.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    v = (
        guess - (1 - alpha_bar).sqrt() * as_noise.noisy_latents
    ) / alpha_bar.sqrt()  # noise = alpha v + sigma x_t
    settings = config.Objective(weighting=weighting)
    torch.testing.assert_close(
        image_losses(noises, guess, as_noise, settings),
        image_losses(vs, v, as_v, settings),
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.parametrize("weighting", ["min_snr", "debiased", "p2"])
@pytest.mark.parametrize("loss", ["l2", "huber", "smooth_l1"])
def test_losses_stay_finite_at_both_ends_of_a_zero_terminal_snr_schedule(
    scheduler, weighting, loss
):
    """Zero terminal SNR: Lin et al. 2024, arXiv:2305.08891."""
    objective = DiffusionObjective(torch.tensor([1.0, 0.5, 0.0]), scheduler.config.prediction_type)
    noised = objective.noised(torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1), torch.arange(3))
    for schedule in ("snr", "exponential", "constant"):
        losses = image_losses(
            objective,
            torch.ones(3, 1, 1, 1),
            noised,
            config.Objective(weighting=weighting, loss=loss, huber_schedule=schedule),
        )
        assert torch.isfinite(losses).all()


def test_sigma_sqrt_weights_equal_diffusers():
    objective = FlowMatchingObjective.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    timesteps = torch.tensor([100.0, 750.0])
    expected = compute_loss_weighting_for_sd3("sigma_sqrt", timesteps / 1000)
    torch.testing.assert_close(
        objective.weights(timesteps, config.Objective(weighting="sigma_sqrt")), expected
    )


def test_a_weighting_for_another_objective_is_refused(tiny_run):
    folder = run_folder.create(tiny_run({"objective.weighting": "sigma_sqrt"}))
    assert (
        run_in(folder) == 1
        and "sigma_sqrt does not suit Stable Diffusion 1.x"
        in run_status.read_status(folder).message
    )


# Errors


def test_huber_is_squared_for_small_errors_and_linear_for_large_ones():
    errors, zero, c = (
        torch.tensor([0.0, 1e-2, 3.0, 100.0]).view(4, 1, 1, 1),
        torch.zeros(4, 1, 1, 1),
        torch.ones(4),
    )
    huber = pointwise_error(errors, zero, "huber", c).flatten()
    torch.testing.assert_close(
        huber, torch.tensor([0.0, 1e-4, 2 * (10**0.5 - 1), 198.01]), rtol=1e-3, atol=1e-6
    )
    torch.testing.assert_close(
        pointwise_error(errors, zero, "smooth_l1", c / 2) / 2,
        pointwise_error(errors, zero, "huber", c / 2) / 1,
    )
    torch.testing.assert_close(pointwise_error(errors, zero, "l2", c), errors**2)


def test_huber_schedules_fall_from_one_at_the_image_to_c_at_the_noise():
    """c is 0.1, the default."""
    objective = DiffusionObjective(torch.tensor([1.0, 0.5, 0.0]), "epsilon")
    noised = Noised(torch.zeros(3, 1, 1, 1), torch.arange(3), torch.zeros(3, 1, 1, 1))

    def losses(schedule):
        settings = config.Objective(loss="huber", huber_schedule=schedule, min_snr_gamma=0.0)
        return image_losses(objective, torch.ones(3, 1, 1, 1), noised, settings)

    def huber(c):
        return 2 * c * ((1 + c**2) ** 0.5 - c)

    torch.testing.assert_close(losses("constant"), torch.full((3,), huber(0.1)))
    torch.testing.assert_close(
        losses("snr"), torch.tensor([huber(1.0), huber(0.9 / 4 + 0.1), huber(0.1)])
    )
    torch.testing.assert_close(
        losses("exponential"),
        torch.tensor([huber(1.0), huber(0.1 ** (1 / 3)), huber(0.1 ** (2 / 3))]),
    )


def test_a_mask_weights_the_positions():
    objective = DiffusionObjective(torch.tensor([0.9, 0.5]), "epsilon")
    noised = Noised(torch.zeros(1, 2, 1, 2), torch.tensor([1]), torch.zeros(1, 2, 1, 2))
    pred = torch.tensor([[[[1.0, 5.0]], [[3.0, 5.0]]]])
    for mask, expected in (
        ([1.0, 0.0], 5.0),
        ([1.0, 1.0], 15.0),
        ([1.0, 0.25], (5 + 0.25 * 25) / 1.25),
    ):
        loss = image_losses(
            objective, pred, noised, UNWEIGHTED, torch.tensor(mask).view(1, 1, 1, 2)
        )
        torch.testing.assert_close(loss, torch.tensor([expected]))


# Noise


def test_a_random_offset_noise_strength_is_uniform_per_image():
    fixed = offset_noise(torch.zeros(500, 4, 1, 1), 0.1, torch.Generator().manual_seed(0))
    drawn = offset_noise(
        torch.zeros(500, 4, 1, 1), 0.1, torch.Generator().manual_seed(0), random_strength=True
    )
    assert float(fixed.std()) == pytest.approx(0.1, rel=0.05)
    strengths = (drawn / fixed)[:, :, 0, 0]
    assert strengths.std(dim=1).max() < 1e-5, "one strength for all channels of an image"
    assert strengths.min() < 0.02 and strengths.max() > 0.98
    assert float(strengths.mean()) == pytest.approx(0.5, abs=0.05)


def test_pyramid_noise_correlates_neighbours_and_has_variance_one():
    plain = torch.randn(64, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert pyramid_noise(plain, 0.0, torch.Generator()) is plain
    noise = pyramid_noise(plain, 0.5, torch.Generator().manual_seed(1))
    torch.testing.assert_close(noise.std(dim=(1, 2, 3)), torch.ones(64))

    def correlation_of_neighbours(x):
        return float((x[..., 1:] * x[..., :-1]).mean())

    assert abs(correlation_of_neighbours(plain)) < 0.02
    assert correlation_of_neighbours(noise) > 0.1
    assert pyramid_noise(torch.randn(1, 4, 1, 1), 0.5, torch.Generator()).isfinite().all()


def prepared(tiny_run):
    from trainer.runs.events import EventLog
    from trainer.training.setup import prepare

    run = tiny_run()
    folder = run_folder.create(run)
    return prepare(run, folder, EventLog(folder / "events.jsonl"))


def test_every_objective_setting_changes_the_loss_of_a_step(tiny_run):
    session = prepared(tiny_run)
    plain, changes = session.run, [
        {},
        {"min_snr_gamma": 0.0},
        {"weighting": "debiased"},
        {"weighting": "p2"},
        {"weighting": "p2", "p2_gamma": 0.3},
        {"loss": "huber"},
        {"loss": "huber", "huber_c": 0.5},
        {"loss": "huber", "huber_schedule": "exponential"},
        {"loss": "huber", "huber_schedule": "constant"},
        {"loss": "smooth_l1"},
        {"timestep_sampling": "logit_normal"},
        {"timestep_sampling": "logit_normal", "logit_mean": 1.0},
        {"timestep_sampling": "logit_normal", "logit_std": 0.3},
        {"min_timestep": 700},
        {"max_timestep": 300},
        {"noise_offset": 0.3},
        {"noise_offset": 0.3, "noise_offset_random": True},
        {"pyramid_noise": 0.3},
        {"input_perturbation": 0.2},
    ]  # fmt: skip
    losses = []
    for change in changes:
        session.run = config.replace(
            plain, {f"objective.{name}": value for name, value in change.items()}
        )
        losses.append(sum(float(sum(microbatch_losses(session, i)).detach()) for i in range(4)))
    assert len(set(losses)) == len(losses)


def test_the_target_of_a_perturbed_input_is_the_unperturbed_noise(tiny_run):
    from trainer.families.base import Batch

    session = prepared(tiny_run)
    session.run = config.replace(session.run, {"objective.input_perturbation": 0.1})
    latents, noise, other = torch.randn(3, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([100, 900])
    batch = Batch(latents, {}, torch.zeros(2, 6))
    noised = _noised(session, batch, noise, timesteps, other)
    torch.testing.assert_close(noised.target, noise)
    expected = session.model.objective.noised(latents, other, timesteps).noisy_latents
    torch.testing.assert_close(noised.noisy_latents, expected)


# Timesteps


def test_timesteps_stay_in_the_range_of_the_settings():
    settings = config.Objective(min_timestep=200, max_timestep=300)
    positions = sample_positions(EVEN, "uniform", settings)
    assert 0.2 <= positions.min() < 0.201
    assert 0.299 < positions.max() <= 0.3
    torch.testing.assert_close(
        sample_positions(EVEN, "logit_normal", DEFAULT),
        TIMESTEP_SAMPLING["logit_normal"](EVEN, DEFAULT),
    )
    with pytest.raises(ConfigError, match="not below"):
        config.replace(
            config.RunConfig(), {"objective.min_timestep": 500, "objective.max_timestep": 500}
        )


def test_logit_normal_settings_have_the_meaning_of_diffusers():
    torch.manual_seed(0)
    theirs = compute_density_for_timestep_sampling(
        "logit_normal", 200_000, logit_mean=0.5, logit_std=0.6
    )
    ours = sample_positions(EVEN, "logit_normal", config.Objective(logit_mean=0.5, logit_std=0.6))
    deciles = torch.arange(1, 10) / 10
    torch.testing.assert_close(ours.quantile(deciles), theirs.quantile(deciles), rtol=0, atol=5e-3)

"""The section [objective] of the settings."""

from typing import Literal

from pydantic import Field

from trainer.config.settings.section import Section


class Objective(Section):
    """Noise, timesteps and loss."""

    weighting: Literal["min_snr", "debiased", "p2", "sigma_sqrt"] = Field(
        default="min_snr", title="Loss weighting"
    )
    """How the loss is weighted by noise level. min_snr suits most runs. debiased raises the
    weight of high noise levels (Yu et al. 2023, arXiv:2310.08442). p2 lowers the weight of low
    noise levels (Choi et al. 2022, arXiv:2204.00227). sigma_sqrt is for Stable Diffusion 3 (Esser
    et al. 2024, arXiv:2403.03206)."""

    min_snr_gamma: float = Field(default=5.0, title="Min SNR gamma", ge=0)
    """With min_snr: caps the weight of low noise levels, so that training converges sooner (Hang
    et al. 2023, arXiv:2303.09556). 0 switches it off. Not used by flow matching (Stable Diffusion
    3)."""

    p2_gamma: float = Field(default=1.0, title="P2 weighting gamma", ge=0, le=10)
    """With p2: how strongly low noise levels lose weight, as the power of 1 / (1 + SNR)."""

    loss: Literal["l2", "huber", "smooth_l1"] = Field(default="l2", title="Loss type")
    """l2: squared error. huber and smooth_l1: large errors count less, so that a few unusual
    images do less harm (Khrapov et al. 2024, arXiv:2403.16728). smooth_l1 is the steeper of the
    two."""

    huber_c: float = Field(default=0.1, title="Huber C", gt=0, le=1)
    """With huber and smooth_l1: errors above this threshold count as large."""

    huber_schedule: Literal["snr", "exponential", "constant"] = Field(
        default="snr", title="Huber schedule"
    )
    """With huber and smooth_l1: how the threshold falls from 1 at no noise to Huber C at pure
    noise. constant: Huber C at every timestep."""

    timestep_sampling: Literal["auto", "uniform", "logit_normal", "mode", "cosmap"] = Field(
        default="auto", title="Timestep sampling"
    )
    """Distribution of the timesteps during training (Esser et al. 2024, arXiv:2403.03206).
    uniform: all alike. The others prefer the middle timesteps, logit_normal the most. auto:
    uniform, or logit_normal for Stable Diffusion 3."""

    logit_mean: float = Field(default=0.0, title="Logit-normal mean", ge=-5, le=5)
    """With logit_normal: below 0 prefers less noise, above 0 more noise."""

    logit_std: float = Field(default=1.0, title="Logit-normal std", gt=0, le=5)
    """With logit_normal: the width of the distribution."""

    min_timestep: int = Field(default=0, title="Min timestep", ge=0, le=999)
    """Lowest timestep of training, from 0 (clean image) to 1000 (pure noise). Raise it to leave
    details as they are."""

    max_timestep: int = Field(default=1000, title="Max timestep", ge=1, le=1000)
    """Highest timestep of training, from 0 (clean image) to 1000 (pure noise). Lower it to leave
    the composition as it is."""

    noise_offset: float = Field(default=0.0, title="Noise offset", ge=0, le=1)
    """Shifts the noise of a whole image, so that the adapter can learn very dark or bright
    images. 0.03 to 0.1 is usual; 0 switches it off."""

    noise_offset_random: bool = Field(default=False, title="Noise offset random strength")
    """Draws the strength of the noise offset for each image at random, from 0 to the value
    above."""

    pyramid_noise: float = Field(default=0.0, title="Multires noise discount", ge=0, lt=1)
    """Adds noise at lower and lower resolutions, each weaker by this factor, for darker and
    brighter images and freer compositions (multi-resolution or pyramid noise, Whitaker 2023). 0.1
    to 0.4 is usual; 0 switches it off."""

    prior_preservation: float = Field(default=0.0, title="Prior preservation weight", ge=0, le=100)
    """Preserves what the base model generates without the trigger word (ai-toolkit: differential
    output preservation). Each step also compares the adapter with the base model on the same
    caption, with the class prompt in place of the trigger word. Needs no class images, and takes
    two to three times as long. Try 1; 0 switches it off."""

    input_perturbation: float = Field(default=0.0, title="IP noise gamma", ge=0, le=1)
    """Adds noise to the input that the model does not have to predict, so that the adapter
    tolerates its own errors in sampling (input perturbation, Ning et al. 2023, arXiv:2301.11706).
    0.1 is usual; 0 switches it off."""

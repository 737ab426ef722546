"""The section [objective]."""

from typing import Annotated, Literal

from pydantic import Field

from trainer.config.settings.section import Section


class Objective(Section):
    """What the adapter is asked to predict, and how errors are weighed."""

    weighting: Literal["min_snr", "debiased", "p2", "sigma_sqrt"] = "min_snr"
    """How steps with little and with much noise are weighed. min_snr suits most. debiased gives noisy steps more weight (Yu et al. 2023, arXiv:2310.08442), p2 takes it from the nearly clean ones (Choi et al. 2022, arXiv:2204.00227). sigma_sqrt is for Stable Diffusion 3 (Esser et al. 2024, arXiv:2403.03206)."""
    min_snr_gamma: Annotated[float, Field(ge=0)] = 5.0
    """With min_snr: caps the weight of steps with little noise, so that training converges sooner (Hang et al. 2023, arXiv:2303.09556). 0 switches it off. Flow matching (Stable Diffusion 3) has no such weight."""
    p2_gamma: Annotated[float, Field(ge=0, le=10)] = 1.0
    """With p2: how strongly nearly clean steps lose weight, 1 / (1 + signal to noise) to this power."""
    loss: Literal["l2", "huber", "smooth_l1"] = "l2"
    """How errors count. l2: squared. huber and smooth_l1: large ones less, so that a few odd pictures do less harm (Khrapov et al. 2024, arXiv:2403.16728); smooth_l1 is the steeper of the two."""
    huber_c: Annotated[float, Field(gt=0, le=1)] = 0.1
    """With huber and smooth_l1: from which size on an error is large."""
    huber_schedule: Literal["snr", "exponential", "constant"] = "snr"
    """With huber and smooth_l1: how that size falls from 1 at the picture to huber_c at the noise; constant keeps it everywhere."""
    timestep_sampling: Literal["auto", "uniform", "logit_normal", "mode", "cosmap"] = "auto"
    """How much noise the steps are given (Esser et al. 2024, arXiv:2403.03206). uniform: any amount alike; the others more often a middle one, logit_normal the most. auto: uniform, and logit_normal for Stable Diffusion 3."""
    logit_mean: Annotated[float, Field(ge=-5, le=5)] = 0.0
    """With logit_normal: below 0 less noise, above 0 more."""
    logit_std: Annotated[float, Field(gt=0, le=5)] = 1.0
    """With logit_normal: how far it spreads from its middle."""
    min_timestep: Annotated[int, Field(ge=0, le=999)] = 0
    """Least noise that is trained on, in thousandths of the way to pure noise. Raise it to leave details as they are."""
    max_timestep: Annotated[int, Field(ge=1, le=1000)] = 1000
    """Most noise that is trained on. Lower it to leave the composition as it is."""
    noise_offset: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Shifts the noise of a whole picture a little, so that the adapter can learn very dark or bright pictures. 0.03 to 0.1; 0 switches it off."""
    noise_offset_random: bool = False
    """Draw the strength of the noise offset for each picture, from none to the one above."""
    pyramid_noise: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Adds noise of coarser and coarser grain, each weaker by this factor, for darker and brighter pictures and freer compositions (Whitaker 2023, multi-resolution noise). 0.1 to 0.4; 0 switches it off."""
    prior_preservation: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Keeps what the base does without the trigger word: each step also compares the adapter with the base alone on the same caption, with the class words in the trigger's place. Needs no class pictures; takes two to three times the time. 1 is a start; 0 switches it off."""
    input_perturbation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Adds a little noise that is not to be predicted, so that the adapter forgives its own errors while sampling (Ning et al. 2023, arXiv:2301.11706). 0.1; 0 switches it off."""

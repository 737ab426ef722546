"""What the denoiser learns to predict, as short pure functions with their papers.

Shapes: latents, noise and targets are [B, C, h, w]; places, timesteps and weights are [B].
A place is where a timestep stands in the noise schedule: 0 at the picture, 1 at the noise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from trainer import config
from trainer.errors import ModelError


@dataclass(frozen=True)
class Noised:
    noisy_latents: Tensor
    timesteps: Tensor
    target: Tensor


MODE_SCALE = 1.29  # rf/mode(1.29) in the tables of Esser et al.

TIMESTEP_SAMPLING: dict[str, Callable[[Tensor, config.Objective], Tensor]] = {
    "uniform": lambda places, settings: places,
    "logit_normal": lambda places, settings: (
        settings.logit_mean + settings.logit_std * torch.special.ndtri(places)
    ).sigmoid(),
    "mode": lambda places, settings: (
        1 - places - MODE_SCALE * ((math.pi / 2 * places).cos() ** 2 - 1 + places)
    ),
    "cosmap": lambda places, settings: 1 - 1 / ((math.pi / 2 * places).tan() + 1),
}
"""Uniform draws to places that are dense where the learning is hard (Esser et al. 2024, arXiv:2403.03206, section 3.1).

Each is the inverse of its distribution function, so that draws which are spread evenly stay so.
"""


def sample_places(places: Tensor, sampling: str, settings: config.Objective) -> Tensor:
    """Uniform draws to places in the trained range, distributed as the named sampling."""
    low, high = settings.min_timestep / 1000, settings.max_timestep / 1000
    return low + (high - low) * TIMESTEP_SAMPLING[sampling](places, settings)


def snr(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """Signal-to-noise ratio, alpha_bar / (1 - alpha_bar); 0 at the end of a schedule with zero terminal SNR."""
    alpha_bar = alphas_cumprod[timesteps]
    return alpha_bar / (1 - alpha_bar)


def min_snr_weights(ratio: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Loss weights that cap the influence of steps with little noise (Hang et al. 2023, arXiv:2303.09556, section 3.4).

    For v prediction the loss already carries a factor SNR + 1, which is divided out (same paper, appendix).
    """
    if prediction_type == "v_prediction":
        return ratio.clamp(max=gamma) / (ratio + 1)
    return (gamma / ratio).clamp(max=1)


LEAST_SNR = 1e-3  # below the schedules of Stable Diffusion; keeps the weight finite where the SNR ends at zero


def debiased_weights(ratio: Tensor, prediction_type: str) -> Tensor:
    """1 / sqrt(SNR), so that noisy steps count as their error in the picture does (Yu et al. 2023, arXiv:2310.08442, section 4)."""
    return _of_noise_error(ratio.clamp(LEAST_SNR, 1 / LEAST_SNR).rsqrt(), ratio, prediction_type)


def p2_weights(ratio: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """1 / (1 + SNR)^gamma: less for the steps that only clean up (Choi et al. 2022, arXiv:2204.00227, section 3.3, k = 1)."""
    return _of_noise_error((1 + ratio) ** -gamma, ratio, prediction_type)


def _of_noise_error(weights: Tensor, ratio: Tensor, prediction_type: str) -> Tensor:
    """Weights of errors in the noise as weights of those in v: the noise is off by alpha times as much, alpha^2 = SNR / (SNR + 1)."""
    return weights / (1 + 1 / ratio) if prediction_type == "v_prediction" else weights


HUBER_SCHEDULES: dict[str, Callable[[float, Tensor, Tensor], Tensor]] = {
    "constant": lambda c, place, ratio: torch.full_like(place, c),
    "exponential": lambda c, place, ratio: c**place,
    "snr": lambda c, place, ratio: (1 - c) / (1 + ratio.rsqrt()) ** 2 + c,
}
"""Where an error becomes a large one, by the place in the noise schedule and its SNR (Khrapov et al. 2024, arXiv:2403.16728, section 4)."""


def pointwise_error(model_pred: Tensor, target: Tensor, loss: str, c: Tensor) -> Tensor:
    """Squared error, or its pseudo-Huber relative with the bend at c, [B]: float32, the shape of the prediction.

    2 c (sqrt(e^2 + c^2) - c) is e^2 for small errors and 2 c |e| for large ones; smooth_l1 leaves out the factor c.
    """
    difference = model_pred.float() - target.float()
    if loss == "l2":
        return difference.square()
    c = c.view(-1, 1, 1, 1)
    bent = 2 * ((difference.square() + c**2).sqrt() - c)
    return c * bent if loss == "huber" else bent


def image_losses(
    objective: "Objective",
    model_pred: Tensor,
    noised: Noised,
    settings: config.Objective,
    mask: Tensor | None = None,
) -> Tensor:
    """Weighted mean error of each picture, float32, [B]. A mask, [B, 1, h, w] in 0..1, says how much each place counts."""
    place, ratio = objective.noise_share(noised.timesteps), objective.snr(noised.timesteps)
    bend = HUBER_SCHEDULES[settings.huber_schedule](settings.huber_c, place, ratio)
    error = pointwise_error(model_pred, noised.target, settings.loss, bend)
    mean = (
        error.mean(dim=(1, 2, 3))
        if mask is None
        else (error.mean(dim=1, keepdim=True) * mask).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3))
    )
    return mean * objective.weights(noised.timesteps, settings)


def offset_noise(
    noise: Tensor, strength: float, generator: torch.Generator, random_strength: bool = False
) -> Tensor:
    """Adds one random constant per picture and channel (Guttenberg 2023, "Diffusion with offset noise")."""
    if strength == 0:
        return noise
    offset = strength * torch.randn(*noise.shape[:2], 1, 1, generator=generator)
    if random_strength:
        offset = offset * torch.rand(len(noise), 1, 1, 1, generator=generator)
    return noise + offset.to(noise.device)


def pyramid_noise(noise: Tensor, discount: float, generator: torch.Generator) -> Tensor:
    """Noise with coarser grains in it, each two to four times as wide as the last and `discount` times as strong; of variance 1 again.

    Whitaker 2023, "Multi-Resolution Noise for Diffusion Model Training".
    """
    if discount == 0:
        return noise
    size, total, strength, (height, width) = noise.shape, noise, 1.0, map(float, noise.shape[2:])
    while height >= 2 and width >= 2:
        shrink = 2 + 2 * float(torch.rand(1, generator=generator))
        height, width, strength = height / shrink, width / shrink, strength * discount
        grains = torch.randn(
            *size[:2], max(1, int(height)), max(1, int(width)), generator=generator
        )
        total = total + strength * torch.nn.functional.interpolate(
            grains, size=size[2:], mode="bilinear"
        ).to(noise.device)
    return total / total.std(dim=(1, 2, 3), keepdim=True)


@dataclass(frozen=True)
class DiffusionObjective:
    """Denoising diffusion with epsilon (Ho et al. 2020) or v (Salimans & Ho 2022) prediction."""

    alphas_cumprod: Tensor
    """[T], float32."""
    prediction_type: str
    timestep_sampling = "uniform"
    """Where the settings leave it to the base."""
    weightings = ("min_snr", "debiased", "p2")

    @classmethod
    def from_scheduler(cls, noise_scheduler: Any) -> "DiffusionObjective":
        """Takes the noise schedule of a diffusers pipeline. Raises ModelError for one that is neither."""
        if not hasattr(noise_scheduler, "alphas_cumprod"):
            name = type(noise_scheduler).__name__
            raise ModelError(
                f"The base model's noise schedule ({name}) is none of Stable Diffusion's; no adapter can be trained on it."
            )
        prediction_type = noise_scheduler.config.prediction_type
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ModelError(
                f"The base model asks for {prediction_type} prediction; adapters are trained on epsilon or v prediction."
            )
        return cls(noise_scheduler.alphas_cumprod.float(), prediction_type)

    def timesteps(self, places: Tensor) -> Tensor:
        """Whole numbers from 0 to T - 1."""
        total = len(self.alphas_cumprod)
        return (places * total).long().clamp(max=total - 1)

    def to(self, device: torch.device) -> "DiffusionObjective":
        return DiffusionObjective(self.alphas_cumprod.to(device), self.prediction_type)

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Noised:
        alpha_bar = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        target = noise if self.prediction_type == "epsilon" else signal * noise - sigma * latents
        return Noised(signal * latents + sigma * noise, timesteps, target)

    def snr(self, timesteps: Tensor) -> Tensor:
        return snr(self.alphas_cumprod, timesteps)

    def noise_share(self, timesteps: Tensor) -> Tensor:
        """The places of timesteps, 0 to 1."""
        return timesteps / len(self.alphas_cumprod)

    def weights(self, timesteps: Tensor, settings: config.Objective) -> Tensor:
        ratio = self.snr(timesteps)
        if settings.weighting == "debiased":
            return debiased_weights(ratio, self.prediction_type)
        if settings.weighting == "p2":
            return p2_weights(ratio, settings.p2_gamma, self.prediction_type)
        return (
            min_snr_weights(ratio, settings.min_snr_gamma, self.prediction_type)
            if settings.min_snr_gamma
            else torch.ones_like(ratio)
        )


@dataclass(frozen=True)
class FlowMatchingObjective:
    """Rectified flow, straight from the picture to the noise (Liu et al. 2022, arXiv:2209.03003; Esser et al. 2024, arXiv:2403.03206)."""

    table: Tensor
    """The timesteps by growing noise, [T], float32, each 1000 times its share of noise (sigma); shifted as the base has it."""
    prediction_type: str = "flow"
    timestep_sampling = "logit_normal"
    weightings = ("min_snr", "sigma_sqrt")  # the first is the default, and changes nothing here

    @classmethod
    def from_scheduler(cls, noise_scheduler: Any) -> "FlowMatchingObjective":
        """Takes the timesteps of a diffusers pipeline with its shift (Esser et al., section 5.3.2). Raises ModelError for another kind."""
        if not isinstance(noise_scheduler, FlowMatchEulerDiscreteScheduler):
            name = type(noise_scheduler).__name__
            raise ModelError(
                f"The base model's noise schedule ({name}) is not one of flow matching; no adapter can be trained on it."
            )
        return cls(noise_scheduler.timesteps.float().flip(0))

    def timesteps(self, places: Tensor) -> Tensor:
        return self.table[(places * len(self.table)).long().clamp(max=len(self.table) - 1)]

    def to(self, device: torch.device) -> "FlowMatchingObjective":
        return FlowMatchingObjective(self.table.to(device))

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Noised:
        sigma = self.noise_share(timesteps).view(-1, 1, 1, 1)
        return Noised((1 - sigma) * latents + sigma * noise, timesteps, noise - latents)

    def snr(self, timesteps: Tensor) -> Tensor:
        sigma = self.noise_share(timesteps)
        return ((1 - sigma) / sigma) ** 2

    def noise_share(self, timesteps: Tensor) -> Tensor:
        """Sigma, 0 to 1."""
        return timesteps / len(self.table)

    def weights(self, timesteps: Tensor, settings: config.Objective) -> Tensor:
        """1 unless asked otherwise: which timesteps are drawn is the weight (Esser et al., section 3.1)."""
        return (
            self.noise_share(timesteps) ** -2
            if settings.weighting == "sigma_sqrt"
            else torch.ones_like(timesteps)
        )


Objective = DiffusionObjective | FlowMatchingObjective

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

from trainer.errors import ModelError


@dataclass(frozen=True)
class Noised:
    noisy_latents: Tensor
    timesteps: Tensor
    target: Tensor


MODE_SCALE = 1.29  # rf/mode(1.29) in the tables of Esser et al.

TIMESTEP_SAMPLING: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda places: places,
    "logit_normal": lambda places: torch.special.ndtri(places).sigmoid(),
    "mode": lambda places: 1 - places - MODE_SCALE * ((math.pi / 2 * places).cos() ** 2 - 1 + places),
    "cosmap": lambda places: 1 - 1 / ((math.pi / 2 * places).tan() + 1),
}
"""Uniform draws to places that are dense where the learning is hard (Esser et al. 2024, arXiv:2403.03206, section 3.1).

Each is the inverse of its distribution function, so that draws which are spread evenly stay so.
"""


def snr(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """Signal-to-noise ratio, alpha_bar / (1 - alpha_bar)."""
    alpha_bar = alphas_cumprod[timesteps]
    return alpha_bar / (1 - alpha_bar)


def min_snr_weights(ratio: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Loss weights that cap the influence of steps with little noise (Hang et al. 2023, arXiv:2303.09556, section 3.4).

    For v prediction the loss already carries a factor SNR + 1, which is divided out (same paper, appendix).
    """
    capped = ratio.clamp(max=gamma)
    return capped / (ratio + 1) if prediction_type == "v_prediction" else capped / ratio


def offset_noise(noise: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Adds one random constant per picture and channel (Guttenberg 2023, "Diffusion with offset noise")."""
    if strength == 0:
        return noise
    return noise + strength * torch.randn(*noise.shape[:2], 1, 1, generator=generator).to(noise.device)


@dataclass(frozen=True)
class DiffusionObjective:
    """Denoising diffusion with epsilon (Ho et al. 2020) or v (Salimans & Ho 2022) prediction."""

    alphas_cumprod: Tensor
    """[T], float32."""
    prediction_type: str
    timestep_sampling = "uniform"
    """Where the settings leave it to the base."""

    @classmethod
    def from_scheduler(cls, noise_scheduler: Any) -> "DiffusionObjective":
        """Takes the noise schedule of a diffusers pipeline. Raises ModelError for one that is neither."""
        if not hasattr(noise_scheduler, "alphas_cumprod"):
            name = type(noise_scheduler).__name__
            raise ModelError(f"The base model's noise schedule ({name}) is none of Stable Diffusion's; no adapter can be trained on it.")
        prediction_type = noise_scheduler.config.prediction_type
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ModelError(f"The base model asks for {prediction_type} prediction; adapters are trained on epsilon or v prediction.")
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

    def weights(self, timesteps: Tensor, min_snr_gamma: float) -> Tensor:
        if min_snr_gamma == 0:
            return torch.ones_like(timesteps, dtype=torch.float32)
        return min_snr_weights(snr(self.alphas_cumprod, timesteps), min_snr_gamma, self.prediction_type)

    def loss(self, model_pred: Tensor, noised: Noised, min_snr_gamma: float) -> Tensor:
        """Weighted mean squared error of each picture, float32, [B]."""
        error = (model_pred.float() - noised.target.float()).square().mean(dim=(1, 2, 3))
        return error * self.weights(noised.timesteps, min_snr_gamma)


@dataclass(frozen=True)
class FlowMatchingObjective:
    """Rectified flow: the straight way from the picture to the noise (Liu et al. 2022, arXiv:2209.03003; Esser et al. 2024, arXiv:2403.03206)."""

    table: Tensor
    """The timesteps by growing noise, [T], float32, each 1000 times its share of noise (sigma); shifted to more noise as the base has it."""
    prediction_type: str = "flow"
    timestep_sampling = "logit_normal"

    @classmethod
    def from_scheduler(cls, noise_scheduler: Any) -> "FlowMatchingObjective":
        """Takes the timesteps of a diffusers pipeline with its shift (Esser et al., section 5.3.2). Raises ModelError for another kind."""
        if not isinstance(noise_scheduler, FlowMatchEulerDiscreteScheduler):
            name = type(noise_scheduler).__name__
            raise ModelError(f"The base model's noise schedule ({name}) is not one of flow matching; no adapter can be trained on it.")
        return cls(noise_scheduler.timesteps.float().flip(0))

    def timesteps(self, places: Tensor) -> Tensor:
        return self.table[(places * len(self.table)).long().clamp(max=len(self.table) - 1)]

    def to(self, device: torch.device) -> "FlowMatchingObjective":
        return FlowMatchingObjective(self.table.to(device))

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Noised:
        sigma = timesteps.view(-1, 1, 1, 1) / len(self.table)
        return Noised((1 - sigma) * latents + sigma * noise, timesteps, noise - latents)

    def loss(self, model_pred: Tensor, noised: Noised, min_snr_gamma: float) -> Tensor:
        """Mean squared error of each picture, float32, [B]. Unweighted: which timesteps are drawn is the weight."""
        return (model_pred.float() - noised.target.float()).square().mean(dim=(1, 2, 3))


Objective = DiffusionObjective | FlowMatchingObjective

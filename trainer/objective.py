"""What the denoiser learns to predict, as short pure functions with their papers.

Shapes: latents, noise and targets are [B, C, h, w]; timesteps and weights are [B].
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.errors import ModelError


@dataclass(frozen=True)
class Noised:
    noisy_latents: Tensor
    timesteps: Tensor
    target: Tensor


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

    @property
    def train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

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

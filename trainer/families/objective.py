"""What the denoiser learns to predict, as short pure functions with their papers.

Latents, noise, predictions and targets are [B, C, h, w]. Positions, timesteps, noise levels,
signal-to-noise ratios and loss weights are [B].

A *position* in the noise schedule is 0 at the image and 1 at pure noise. `Objective.timesteps`
maps it to the *timestep* that the denoiser receives. A *noise level* is the share of noise at a
timestep. It differs from the position only if the base shifts its schedule.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from trainer import config
from trainer.errors import ModelError


@dataclass(frozen=True)
class Noised:
    """Noisy latents and what the denoiser should predict for them."""

    noisy_latents: Tensor
    timesteps: Tensor
    target: Tensor


class Objective(Protocol):
    """The noise schedule of a base model and the target of its denoiser."""

    @property
    def prediction_type(self) -> str:
        """Returns "epsilon", "v_prediction" or "flow"."""
        ...

    @property
    def timestep_sampling(self) -> str:
        """The key of TIMESTEP_SAMPLING that is used if the settings choose "auto"."""
        ...

    @property
    def weightings(self) -> tuple[str, ...]:
        """The values of `objective.weighting` that apply to this objective."""
        ...

    def to(self, device: torch.device) -> "Objective":
        """Returns the same objective with its tensors on the device."""
        ...

    def timesteps(self, positions: Tensor) -> Tensor:
        """Returns the timesteps at these positions, as the denoiser expects them."""
        ...

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Noised:
        """Mixes latents and noise."""
        ...

    def snr(self, timesteps: Tensor) -> Tensor:
        """Returns the signal-to-noise ratio (signal variance over noise variance)."""
        ...

    def noise_level(self, timesteps: Tensor) -> Tensor:
        """Returns the share of noise, 0 to 1."""
        ...

    def weights(self, timesteps: Tensor, settings: config.Objective) -> Tensor:
        """Returns the factor of each image's loss."""
        ...


# Timestep sampling (Esser et al. 2024, arXiv:2403.03206, section 3.1)
#
# Each function maps uniform positions to positions that are denser at some noise levels. It is the
# inverse of a distribution function, so evenly spread positions stay evenly spread.

MODE_SCALE = 1.29  # "rf/mode(1.29)" in the tables of Esser et al.


def uniform(positions: Tensor, settings: config.Objective) -> Tensor:
    """Leaves the positions uniform."""
    return positions


def logit_normal(positions: Tensor, settings: config.Objective) -> Tensor:
    """Favours the middle: the logit of the position is normally distributed."""
    return (settings.logit_mean + settings.logit_std * torch.special.ndtri(positions)).sigmoid()


def mode(positions: Tensor, settings: config.Objective) -> Tensor:
    """Favours the middle, with heavier tails than `logit_normal`."""
    return 1 - positions - MODE_SCALE * ((math.pi / 2 * positions).cos() ** 2 - 1 + positions)


def cosmap(positions: Tensor, settings: config.Objective) -> Tensor:
    """Gives a flow the log-SNR distribution of a cosine schedule."""
    return 1 - 1 / ((math.pi / 2 * positions).tan() + 1)


TIMESTEP_SAMPLING: dict[str, Callable[[Tensor, config.Objective], Tensor]] = {
    "uniform": uniform,
    "logit_normal": logit_normal,
    "mode": mode,
    "cosmap": cosmap,
}
"""Values of `objective.timestep_sampling`."""


def sample_positions(uniform_draws: Tensor, sampling: str, settings: config.Objective) -> Tensor:
    """Returns positions in the trained range, distributed as the named sampling.

    `uniform_draws` are uniform in 0..1, [B].
    """
    low, high = settings.min_timestep / 1000, settings.max_timestep / 1000
    return low + (high - low) * TIMESTEP_SAMPLING[sampling](uniform_draws, settings)


# Loss weights

MIN_SNR = 1e-3  # below all schedules of Stable Diffusion; keeps weights finite if the SNR ends at 0


def snr(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """Returns alpha_bar / (1 - alpha_bar), 0 at the end of a zero terminal SNR schedule."""
    alpha_bar = alphas_cumprod[timesteps]
    return alpha_bar / (1 - alpha_bar)


def min_snr_weights(ratio: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Returns min(SNR, gamma) / SNR, which limits the influence of steps with little noise.

    The v-prediction loss already has a factor of SNR + 1, which is divided out (Hang et al. 2023,
    arXiv:2303.09556, section 3.4 and appendix).
    """
    if prediction_type == "v_prediction":
        return ratio.clamp(max=gamma) / (ratio + 1)
    return (gamma / ratio).clamp(max=1)


def debiased_weights(ratio: Tensor, prediction_type: str) -> Tensor:
    """Returns 1 / sqrt(SNR), so that noisy steps count as much as their error in the image.

    Source: Yu et al. 2023, arXiv:2310.08442, section 4.
    """
    weights = ratio.clamp(MIN_SNR, 1 / MIN_SNR).rsqrt()
    return _from_noise_error_weights(weights, ratio, prediction_type)


def p2_weights(ratio: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Returns 1 / (1 + SNR)^gamma, less for steps that only remove the last noise.

    Source: Choi et al. 2022, arXiv:2204.00227, section 3.3, with k = 1.
    """
    return _from_noise_error_weights((1 + ratio) ** -gamma, ratio, prediction_type)


def _from_noise_error_weights(weights: Tensor, ratio: Tensor, prediction_type: str) -> Tensor:
    """Converts weights for errors in epsilon to weights for errors in the predicted quantity.

    An error in v is an error in epsilon divided by alpha, and alpha^2 = SNR / (SNR + 1).
    """
    return weights / (1 + 1 / ratio) if prediction_type == "v_prediction" else weights


# Losses
#
# A Huber schedule returns the error at which a loss turns from squared to linear, [B], from
# `objective.huber_c`, the noise level and the SNR (Khrapov et al. 2024, arXiv:2403.16728, sec. 4).


def constant_huber(c: float, noise_level: Tensor, ratio: Tensor) -> Tensor:
    """Returns c at every noise level."""
    return torch.full_like(noise_level, c)


def exponential_huber(c: float, noise_level: Tensor, ratio: Tensor) -> Tensor:
    """Falls from 1 at the image to c at pure noise."""
    return c**noise_level


def snr_huber(c: float, noise_level: Tensor, ratio: Tensor) -> Tensor:
    """Falls from 1 at the image to c at pure noise, following the SNR."""
    return (1 - c) / (1 + ratio.rsqrt()) ** 2 + c


HUBER_SCHEDULES: dict[str, Callable[[float, Tensor, Tensor], Tensor]] = {
    "constant": constant_huber,
    "exponential": exponential_huber,
    "snr": snr_huber,
}
"""Values of `objective.huber_schedule`."""


def pointwise_error(model_pred: Tensor, target: Tensor, loss: str, c: Tensor) -> Tensor:
    """Returns the error of every latent value, float32, in the shape of the prediction.

    "l2" is the squared error. "huber" is 2 c (sqrt(e^2 + c^2) - c), which is e^2 for small errors
    and 2 c |e| for large ones. "smooth_l1" is the same without the factor c. `c` is [B].
    """
    difference = model_pred.float() - target.float()
    if loss == "l2":
        return difference.square()
    c = c.view(-1, 1, 1, 1)
    smooth_l1 = 2 * ((difference.square() + c**2).sqrt() - c)
    return c * smooth_l1 if loss == "huber" else smooth_l1


def image_losses(
    objective: Objective,
    model_pred: Tensor,
    noised: Noised,
    settings: config.Objective,
    mask: Tensor | None = None,
) -> Tensor:
    """Returns the weighted mean error of each image, [B], float32.

    `mask`, [B, 1, h, w] in 0..1, is the weight of each latent position; None weights all equally.
    """
    noise_level, ratio = objective.noise_level(noised.timesteps), objective.snr(noised.timesteps)
    c = HUBER_SCHEDULES[settings.huber_schedule](settings.huber_c, noise_level, ratio)
    error = pointwise_error(model_pred, noised.target, settings.loss, c)
    if mask is None:
        mean = error.mean(dim=(1, 2, 3))
    else:
        weighted = error.mean(dim=1, keepdim=True) * mask
        mean = weighted.sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3))
    return mean * objective.weights(noised.timesteps, settings)


# Noise


def offset_noise(
    noise: Tensor, strength: float, generator: torch.Generator, random_strength: bool = False
) -> Tensor:
    """Adds one random constant per image and channel.

    `random_strength` multiplies it by a uniform number per image. Source: Guttenberg 2023,
    "Diffusion with offset noise".
    """
    if strength == 0:
        return noise
    offset = strength * torch.randn(*noise.shape[:2], 1, 1, generator=generator)
    if random_strength:
        offset = offset * torch.rand(len(noise), 1, 1, 1, generator=generator)
    return noise + offset.to(noise.device)


def pyramid_noise(noise: Tensor, discount: float, generator: torch.Generator) -> Tensor:
    """Adds noise of lower and lower resolution, and scales the sum back to variance 1.

    Each level is two to four times coarser than the one before it and `discount` times as strong.
    Source: Whitaker 2023, "Multi-Resolution Noise for Diffusion Model Training".
    """
    if discount == 0:
        return noise
    total, strength = noise, 1.0
    height, width = float(noise.shape[2]), float(noise.shape[3])
    while height >= 2 and width >= 2:
        shrink = 2 + 2 * float(torch.rand(1, generator=generator))
        height, width, strength = height / shrink, width / shrink, strength * discount
        size = (*noise.shape[:2], max(1, int(height)), max(1, int(width)))
        coarse = torch.randn(*size, generator=generator)
        enlarged = torch.nn.functional.interpolate(coarse, size=noise.shape[2:], mode="bilinear")
        total = total + strength * enlarged.to(noise.device)
    return total / total.std(dim=(1, 2, 3), keepdim=True)


# Objectives


@dataclass(frozen=True)
class DiffusionObjective:
    """Denoising diffusion with epsilon (Ho et al. 2020) or v (Salimans & Ho 2022) prediction."""

    alphas_cumprod: Tensor
    """Cumulative product of the alphas, [T], float32."""
    prediction_type: str
    timestep_sampling = "uniform"
    weightings = ("min_snr", "debiased", "p2")

    @classmethod
    def from_scheduler(cls, noise_scheduler: Any) -> "DiffusionObjective":
        """Takes the noise schedule of a diffusers pipeline.

        Raises ModelError unless it is a diffusion schedule with epsilon or v prediction.
        """
        if not hasattr(noise_scheduler, "alphas_cumprod"):
            name = type(noise_scheduler).__name__
            raise ModelError(
                f"The base model has the noise schedule {name}, which Stable Diffusion does not "
                "use; no adapter can be trained on it. Choose another base."
            )
        prediction_type = noise_scheduler.config.prediction_type
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ModelError(
                f"The base model predicts {prediction_type}; "
                "adapters are trained on epsilon or v prediction. Choose another base."
            )
        return cls(noise_scheduler.alphas_cumprod.float(), prediction_type)

    def to(self, device: torch.device) -> "DiffusionObjective":
        return DiffusionObjective(self.alphas_cumprod.to(device), self.prediction_type)

    def timesteps(self, positions: Tensor) -> Tensor:
        """Returns whole numbers from 0 to T - 1."""
        total = len(self.alphas_cumprod)
        return (positions * total).long().clamp(max=total - 1)

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Noised:
        """Returns alpha x + sigma e, and the target e or v = alpha e - sigma x."""
        alpha_bar = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        target = noise if self.prediction_type == "epsilon" else alpha * noise - sigma * latents
        return Noised(alpha * latents + sigma * noise, timesteps, target)

    def snr(self, timesteps: Tensor) -> Tensor:
        return snr(self.alphas_cumprod, timesteps)

    def noise_level(self, timesteps: Tensor) -> Tensor:
        """Returns timestep / T."""
        return timesteps / len(self.alphas_cumprod)

    def weights(self, timesteps: Tensor, settings: config.Objective) -> Tensor:
        ratio = self.snr(timesteps)
        if settings.weighting == "debiased":
            return debiased_weights(ratio, self.prediction_type)
        if settings.weighting == "p2":
            return p2_weights(ratio, settings.p2_gamma, self.prediction_type)
        if settings.min_snr_gamma:
            return min_snr_weights(ratio, settings.min_snr_gamma, self.prediction_type)
        return torch.ones_like(ratio)


@dataclass(frozen=True)
class FlowMatchingObjective:
    """Rectified flow: a straight line from the image to the noise.

    Sources: Liu et al. 2022, arXiv:2209.03003; Esser et al. 2024, arXiv:2403.03206.
    """

    schedule: Tensor
    """All timesteps by increasing noise, [T], float32; each is 1000 sigma, shifted by the base."""
    prediction_type: str = "flow"
    timestep_sampling = "logit_normal"
    weightings = ("min_snr", "sigma_sqrt")  # min_snr is the default setting and has no effect here

    @classmethod
    def from_scheduler(cls, noise_scheduler: Any) -> "FlowMatchingObjective":
        """Takes the timesteps of a diffusers pipeline, with its shift (Esser et al., sec. 5.3.2).

        Raises ModelError unless it is a flow matching schedule.
        """
        if not isinstance(noise_scheduler, FlowMatchEulerDiscreteScheduler):
            name = type(noise_scheduler).__name__
            raise ModelError(
                f"The base model has the noise schedule {name}, which is not one of flow matching; "
                "no adapter can be trained on it. Choose another base."
            )
        return cls(noise_scheduler.timesteps.float().flip(0))

    def to(self, device: torch.device) -> "FlowMatchingObjective":
        return FlowMatchingObjective(self.schedule.to(device))

    def timesteps(self, positions: Tensor) -> Tensor:
        """Returns the nearest timesteps of the schedule, float32."""
        total = len(self.schedule)
        return self.schedule[(positions * total).long().clamp(max=total - 1)]

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Noised:
        """Returns (1 - sigma) x + sigma e, and the target e - x."""
        sigma = self.noise_level(timesteps).view(-1, 1, 1, 1)
        return Noised((1 - sigma) * latents + sigma * noise, timesteps, noise - latents)

    def snr(self, timesteps: Tensor) -> Tensor:
        """Returns ((1 - sigma) / sigma)^2."""
        sigma = self.noise_level(timesteps)
        return ((1 - sigma) / sigma) ** 2

    def noise_level(self, timesteps: Tensor) -> Tensor:
        """Returns sigma."""
        return timesteps / len(self.schedule)

    def weights(self, timesteps: Tensor, settings: config.Objective) -> Tensor:
        """Returns 1 / sigma^2 for "sigma_sqrt", else 1.

        The sampling of timesteps already weights the loss (Esser et al., section 3.1).
        """
        if settings.weighting == "sigma_sqrt":
            return self.noise_level(timesteps) ** -2
        return torch.ones_like(timesteps)

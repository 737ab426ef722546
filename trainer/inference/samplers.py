"""Samplers by the names of A1111, and which of them suit a base."""

from inspect import signature
from typing import Any, NamedTuple

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from trainer.errors import ModelError


class SchedulerChoice(NamedTuple):
    """A scheduler of diffusers and the options that it needs for a sampler."""

    scheduler: Any
    options: dict[str, Any]


SAMPLERS = {
    "DPM++ 2M": SchedulerChoice(DPMSolverMultistepScheduler, {}),
    "DPM++ 2M Karras": SchedulerChoice(DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "Euler": SchedulerChoice(EulerDiscreteScheduler, {}),
    "Euler a": SchedulerChoice(EulerAncestralDiscreteScheduler, {}),
    "Heun": SchedulerChoice(HeunDiscreteScheduler, {}),
    "DDIM": SchedulerChoice(DDIMScheduler, {}),
    "UniPC": SchedulerChoice(UniPCMultistepScheduler, {}),
}
"""The first one is the default. It needs fewer steps than Euler."""
FLOW_SAMPLERS = {
    "Euler": SchedulerChoice(FlowMatchEulerDiscreteScheduler, {}),
    "Heun": SchedulerChoice(FlowMatchHeunDiscreteScheduler, {}),
}
"""For flow matching. Its paths are nearly straight, so Euler's steps are enough by default."""
ZERO_SNR = "rescale_betas_zero_snr"
"""Option of a schedule that ends in pure noise."""


def compatible_samplers(pipe: Any) -> dict[str, SchedulerChoice]:
    """Returns the samplers that suit the base of a pipeline. The first one is the default."""
    if type(pipe.scheduler).__name__.startswith("FlowMatch"):
        return FLOW_SAMPLERS
    if not pipe.scheduler.config.get(ZERO_SNR):
        return SAMPLERS
    # A scheduler without this option would start from another noise level.
    compatible = {}
    for name, choice in SAMPLERS.items():
        if ZERO_SNR in signature(choice.scheduler.__init__).parameters:
            compatible[name] = choice
    return compatible


def sampler_name(pipe: Any, requested: str = "auto") -> str:
    """Returns the sampler to use. Raises ModelError if the base does not support it."""
    compatible = compatible_samplers(pipe)
    if requested == "auto":
        return next(iter(compatible))
    if requested not in compatible:
        raise ModelError(
            f"This base does not support the sampler {requested}. "
            f"Choose one of: {', '.join(compatible)}."
        )
    return requested

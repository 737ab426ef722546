"""What one image costs in each kind of base model (docs/estimates.md)."""

from collections.abc import Mapping
from dataclasses import dataclass

from trainer.config import RunConfig
from trainer.models.model_files import BaseFiles, inspect, locate
from trainer.models.pipelines import T5_PARTS


@dataclass(frozen=True)
class Costs:
    """Costs of one image in a kind of model, in units that do not depend on its resolution.

    Counted with torch's flop counter and saved-tensor hooks on the full-size models. The
    parameters are those of the published models, for a model that is not on this machine yet.
    """

    activations: float
    """Numbers that a training step stores per latent position and channel of the denoiser's first
    level."""
    activations_checkpointed: float
    """The same with gradient checkpointing, at the peak."""
    operations: float
    """Operations of a LoRA step per latent position and parameter of the denoiser. A multiply-add
    is two."""
    operations_checkpointed: float
    """The same with gradient checkpointing."""
    parameters: Mapping[str, float]
    """Parameters by component."""
    width: int
    """Channels of the denoiser's first level."""
    linear_share: float
    """Fraction of the denoiser's weights in linear layers. Only these can be quantised."""
    vae_side: int
    """Side of the images that the VAE was made for, in pixels."""
    latent_step: int = 8
    """Pixels per latent position along a side."""
    name_parts: tuple[str, ...] = ()
    """One of these is in the name of a model of this kind. The kind without any has all others."""


COSTS = {
    "StableDiffusionPipeline": Costs(
        activations=305,
        activations_checkpointed=80,
        operations=0.51,
        operations_checkpointed=0.68,
        parameters={"unet": 860e6, "text_encoder": 123e6, "vae": 84e6},
        width=320,
        linear_share=0.31,
        vae_side=512,
    ),
    "StableDiffusion3Pipeline": Costs(
        activations=154,
        activations_checkpointed=15,
        operations=0.71,
        operations_checkpointed=0.99,
        parameters={
            "transformer": 2243e6,
            "text_encoder": 123e6,
            "text_encoder_2": 695e6,
            "text_encoder_3": 4762e6,
            "vae": 84e6,
        },
        width=1536,
        linear_share=1.0,
        vae_side=1024,
        name_parts=("stable-diffusion-3", "sd3"),
    ),
    "StableDiffusionXLPipeline": Costs(
        activations=535,
        activations_checkpointed=58,
        operations=0.35,
        operations_checkpointed=0.47,
        parameters={"unet": 2567e6, "text_encoder": 123e6, "text_encoder_2": 695e6, "vae": 84e6},
        width=320,
        linear_share=0.87,
        vae_side=1024,
        name_parts=("xl",),
    ),
}
"""Costs by the pipeline in model_index.json."""

DEFAULT_PIPELINE = "StableDiffusionPipeline"
VAE_WIDTHS = (128,) * 4
"""Channels of the VAE's levels, if its configuration does not contain them."""


@dataclass(frozen=True)
class Size:
    """The size of a base model."""

    costs: Costs
    parameters: Mapping[str, float]
    """Parameters by component."""
    width: int
    """Channels of the denoiser's first level, or of its transformer blocks."""
    latent_step: int
    vae_side: int
    vae_width: int = VAE_WIDTHS[0]

    @property
    def denoiser(self) -> float:
        """Parameters of the UNet or the transformer."""
        return self.parameters.get("unet", 0) + self.parameters.get("transformer", 0)

    @property
    def text_encoders(self) -> float:
        """Parameters of all text encoders."""
        parameters = self.parameters.items()
        return sum(count for part, count in parameters if part.startswith("text_encoder"))


def size_of(run: RunConfig) -> Size:
    """Returns the size of the base, counted in its files or, without them, by its name."""
    folder = locate(run.base)
    if folder is not None:
        return _counted_size(inspect(folder, run.base.t5))
    costs = COSTS[kind_by_name(run.base.model)]
    parameters = {
        part: count
        for part, count in costs.parameters.items()
        if run.base.t5 or part not in T5_PARTS
    }
    return Size(costs, parameters, costs.width, costs.latent_step, costs.vae_side)


def kind_by_name(model: str) -> str:
    """Returns the pipeline of a model that is not on this machine, guessed from its name."""
    name = model.lower()
    for pipeline, costs in COSTS.items():
        if any(part in name for part in costs.name_parts):
            return pipeline
    return DEFAULT_PIPELINE


def _counted_size(base: BaseFiles) -> Size:
    costs = COSTS[base.pipeline]
    parameters = {
        part: float(sum(info.numel for info in tensors.values()))
        for part, tensors in base.tensors.items()
    }
    vae = base.configs["vae"]
    levels = vae.get("block_out_channels") or VAE_WIDTHS
    side = vae.get("sample_size", costs.vae_side)
    latent_step = 2 ** (len(levels) - 1)
    width = _denoiser_width(base, costs)
    return Size(costs, parameters, width, latent_step, int(side), int(levels[0]))


def _denoiser_width(base: BaseFiles, costs: Costs) -> int:
    transformer = base.configs.get("transformer")
    if transformer:
        return int(transformer["num_attention_heads"]) * int(transformer["attention_head_dim"])
    unet = base.configs.get("unet") or {}
    widths = unet.get("block_out_channels") or [costs.width]
    return int(widths[0])

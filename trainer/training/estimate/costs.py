"""What a kind of base model costs."""

from dataclasses import dataclass

from trainer.config import RunConfig
from trainer.models.model_files import BaseFiles, inspect, locate
from trainer.models.pipelines import T5_PARTS


@dataclass(frozen=True)
class Costs:
    """What one image costs in a kind of model, in units that do not depend on its size.

    Counted with torch's flop counter and saved-tensor hooks on the full-size models; the parameters are those of the published ones,
    for a model that is not on this machine yet.
    """

    kept: float
    """Numbers that a training step keeps per latent position and channel of the denoiser's first level."""
    kept_checkpointed: float
    """The same with gradient checkpointing, at the peak."""
    operations: float
    """Of a LoRA step, per latent position and parameter of the denoiser (a multiply-add is two)."""
    operations_checkpointed: float
    parameters: dict[str, float]
    width: int
    linear_share: float
    """Of the denoiser's weights, those in linear layers: only these can be kept in 8 or 4 bits."""
    vae_side: int
    """Pixels along a side of the pictures that the VAE was made for."""
    latent_step: int = 8
    """Pixels per latent position along a side."""
    named: tuple[str, ...] = ()
    """Words, one of which is in the name of a model of this kind; without any it is the kind of all other names."""


COSTS = {
    "StableDiffusionPipeline": Costs(
        305, 80, 0.51, 0.68, {"unet": 860e6, "text_encoder": 123e6, "vae": 84e6}, 320, 0.31, 512
    ),
    "StableDiffusion3Pipeline": Costs(
        154,
        15,
        0.71,
        0.99,
        {
            "transformer": 2243e6,
            "text_encoder": 123e6,
            "text_encoder_2": 695e6,
            "text_encoder_3": 4762e6,
            "vae": 84e6,
        },
        1536,
        1.0,
        1024,
        named=("stable-diffusion-3", "sd3"),
    ),
    "StableDiffusionXLPipeline": Costs(
        535,
        58,
        0.35,
        0.47,
        {"unet": 2567e6, "text_encoder": 123e6, "text_encoder_2": 695e6, "vae": 84e6},
        320,
        0.87,
        1024,
        named=("xl",),
    ),
}

VAE_WIDTH = 128


@dataclass(frozen=True)
class Size:
    """The base model in numbers."""

    costs: Costs
    parameters: dict[str, float]
    """By component."""
    width: int
    latent_step: int
    vae_side: int
    vae_width: int = VAE_WIDTH

    @property
    def denoiser(self) -> float:
        return self.parameters.get("unet", 0) + self.parameters.get("transformer", 0)

    @property
    def text_encoders(self) -> float:
        return sum(
            count for part, count in self.parameters.items() if part.startswith("text_encoder")
        )


def size_of(run: RunConfig) -> Size:
    """Measured from the tensor headers; for a model that is not on this machine, that of its kind, told by its name."""
    folder = locate(run.base)
    if folder is None:
        costs = COSTS[kind_by_name(run.base.model)]
        parameters = {
            part: count
            for part, count in costs.parameters.items()
            if run.base.t5 or part not in T5_PARTS
        }
        return Size(costs, parameters, costs.width, costs.latent_step, costs.vae_side)
    return _measured_size(inspect(folder, run.base.t5))


def kind_by_name(model: str) -> str:
    """The pipeline of a model that is not on this machine."""
    found = (
        pipeline
        for pipeline, costs in COSTS.items()
        if any(word in model.lower() for word in costs.named)
    )
    return next(found, "StableDiffusionPipeline")


def _measured_size(base: BaseFiles) -> Size:
    costs = COSTS[base.pipeline]
    counted = {
        part: float(sum(info.numel for info in tensors.values()))
        for part, tensors in base.tensors.items()
    }
    levels = base.configs["vae"].get("block_out_channels") or [VAE_WIDTH] * 4
    denoiser = base.configs.get("transformer") or base.configs.get("unet") or {}
    widths = denoiser.get("block_out_channels") or [costs.width]
    if "transformer" in base.configs:
        widths = [int(denoiser["num_attention_heads"]) * int(denoiser["attention_head_dim"])]
    side = base.configs["vae"].get("sample_size", costs.vae_side)
    return Size(costs, counted, int(widths[0]), 2 ** (len(levels) - 1), int(side), int(levels[0]))

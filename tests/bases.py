"""What the tests of model families and of adapters need of a base."""

from typing import Any

import torch
from torch import Tensor

from trainer.families.base import Batch, ModelFamily
from trainer.families.objective import Noised

XL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""unet/config.json of stabilityai/stable-diffusion-xl-base-1.0."""


def predict(family: ModelFamily, pipe: Any) -> Tensor:
    """Returns the denoiser's output for two prompts and fixed noise."""
    channels = pipe.vae.config.latent_channels
    latents = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([400, 20])
    size_ids = torch.tensor([[40.0, 24.0, 8.0, 0.0, 16.0, 24.0]]).repeat(2, 1)
    with torch.no_grad():
        conditioning = family.encode_prompts(pipe, ["a red star, żółć", ""])
        batch = Batch(latents, conditioning, size_ids)
        noised = Noised(latents, timesteps, latents)
        return family.predict(family.denoiser(pipe), noised, batch)

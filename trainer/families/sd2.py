"""Stable Diffusion 2.x: a UNet of 1024 wide text, OpenCLIP's text encoder; 512 pixels with epsilon, 768 with v prediction.

The published encoder lacks its last layer, so that its output is the penultimate one, as the UNet learned it.
"""

from typing import Any

from trainer.families.latent_diffusion import LatentDiffusion
from trainer.models.model_files import BaseFiles


class StableDiffusion2(LatentDiffusion):
    name = "Stable Diffusion 2.x"
    metadata_prefixes = ("sd_v2", "stable-diffusion-v2")
    open_clip = ("text_encoder",)
    text_width = 1024

    def matches_base(self, files: BaseFiles) -> bool:
        """Told from 1.x by its linear projections around the attention, which shape the very tensors (2 dimensions instead of 4)."""
        return files.pipeline == "StableDiffusionPipeline" and bool(
            files.configs["unet"].get("use_linear_projection")
        )

    def metadata(self, prediction_type: str) -> dict[str, Any]:
        v = prediction_type == "v_prediction"
        return {
            "ss_base_model_version": "sd_v2_v" if v else "sd_v2",
            "ss_v2": True,
            "modelspec.architecture": "stable-diffusion-v2-768-v/lora"
            if v
            else "stable-diffusion-v2-512/lora",
        }

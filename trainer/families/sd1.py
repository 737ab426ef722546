"""Stable Diffusion 1.x: OpenAI's CLIP text encoder, and a UNet for text of width 768."""

from typing import Any

from trainer.families.latent_diffusion import LatentDiffusion
from trainer.models.model_files import BaseFiles


class StableDiffusion1(LatentDiffusion):
    """Differs from 2.x by the convolutions around its attention."""

    name = "Stable Diffusion 1.x"
    metadata_prefixes = ("sd_v1", "stable-diffusion-v1")
    text_width = 768

    def matches_base(self, files: BaseFiles) -> bool:
        if files.pipeline != "StableDiffusionPipeline":
            return False
        return not files.configs["unet"].get("use_linear_projection")

    def metadata(self, prediction_type: str) -> dict[str, Any]:
        v = prediction_type == "v_prediction"
        return {
            "ss_base_model_version": "sd_v1_v" if v else "sd_v1",
            "ss_v2": False,
            "modelspec.architecture": "stable-diffusion-v1/lora",
        }

"""Stable Diffusion 1.x: a UNet of 768 wide text, OpenAI's CLIP text encoder."""

from typing import Any

from trainer.families.latent_diffusion import LatentDiffusion
from trainer.models.model_files import BaseFiles


class StableDiffusion1(LatentDiffusion):
    name = "Stable Diffusion 1.x"
    metadata_prefixes = ("sd_v1", "stable-diffusion-v1")
    text_width = 768

    def matches_base(self, files: BaseFiles) -> bool:
        return files.pipeline == "StableDiffusionPipeline" and not files.configs["unet"].get(
            "use_linear_projection"
        )

    def metadata(self, prediction_type: str) -> dict[str, Any]:
        v = prediction_type == "v_prediction"
        return {
            "ss_base_model_version": "sd_v1_v" if v else "sd_v1",
            "ss_v2": False,
            "modelspec.architecture": "stable-diffusion-v1/lora",
        }

"""Stable Diffusion 2.x: OpenCLIP's text encoder, and a UNet for text of width 1024.

The 512 pixel models predict epsilon, the 768 pixel models v. The published encoder has no last
layer, so its output is the penultimate layer that the UNet was trained with.
"""

from typing import Any

from trainer.families.latent_diffusion import LatentDiffusion
from trainer.models.model_files import BaseFiles


class StableDiffusion2(LatentDiffusion):
    """Differs from 1.x by the linear layers around its attention.

    Their weights have 2 dimensions. The convolutions of 1.x have 4.
    """

    name = "Stable Diffusion 2.x"
    metadata_prefixes = ("sd_v2", "stable-diffusion-v2")
    open_clip_encoders = ("text_encoder",)
    text_width = 1024

    def matches_base(self, files: BaseFiles) -> bool:
        if files.pipeline != "StableDiffusionPipeline":
            return False
        return bool(files.configs["unet"].get("use_linear_projection"))

    def metadata(self, prediction_type: str) -> dict[str, Any]:
        v = prediction_type == "v_prediction"
        architecture = "stable-diffusion-v2-768-v" if v else "stable-diffusion-v2-512"
        return {
            "ss_base_model_version": "sd_v2_v" if v else "sd_v2",
            "ss_v2": True,
            "modelspec.architecture": f"{architecture}/lora",
        }

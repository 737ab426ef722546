"""Stable Diffusion XL: two text encoders, and a UNet with the image's size and crop as inputs.

Source: Podell et al. 2023, arXiv:2307.01952.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from trainer.families.base import PLAIN_READING, Batch, Conditioning, Reading
from trainer.families.latent_diffusion import LatentDiffusion, frozen_dtype, join_chunks, token_ids
from trainer.families.objective import Noised
from trainer.lora.formats.stability_names import LAYERS_PER_BLOCK, to_ldm
from trainer.models.device import send
from trainer.models.model_files import BaseFiles


class StableDiffusionXL(LatentDiffusion):
    """Text is the concatenation of both encoders' penultimate layers, of width 768 + 1280."""

    name = "Stable Diffusion XL"
    metadata_prefixes = ("sdxl", "stable-diffusion-xl")
    open_clip_encoders = ("text_encoder_2",)
    text_width = 2048
    pipeline_class = StableDiffusionXLPipeline
    pipeline_options = {"feature_extractor": None, "image_encoder": None}
    text_encoder_keys = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    embedding_keys = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    supports_clip_skip = False  # always the penultimate layers

    def matches_base(self, files: BaseFiles) -> bool:
        """Returns whether the files are an SDXL with its usual number of layers per block.

        Smaller UNets of the same pipeline have other block numbers in kohya's keys, which no other
        program would read.
        """
        if files.pipeline != "StableDiffusionXLPipeline":
            return False
        layers: int = files.configs["unet"].get("layers_per_block", 2)
        return layers == LAYERS_PER_BLOCK

    def matches_adapter_keys(self, paths: Collection[str]) -> bool:
        """Returns whether a UNet and a second text encoder are adapted."""
        components = {path.partition(".")[0] for path in paths}
        return components >= {"unet", "text_encoder_2"}

    def encode_prompts(
        self, pipe: Any, prompts: Sequence[str], reading: Reading = PLAIN_READING
    ) -> Conditioning:
        """Returns prompt_embeds [B, 77 x chunks, 2048] and pooled_prompt_embeds [B, 1280].

        prompt_embeds are the penultimate layers of both encoders, concatenated. The last layer of
        the first encoder is not used, so an adapter there stays zero. pooled_prompt_embeds come
        from the second encoder and the first chunk.

        Empty prompts become zeros if the pipeline is configured so, since its sampler does the
        same for a missing negative prompt.
        """
        texts = reading.with_placeholders(prompts)
        first, second = (
            encoder(
                send(token_ids(tokenizer, texts, reading.chunks), encoder.device),
                output_hidden_states=True,
            )
            for tokenizer, encoder in (
                (pipe.tokenizer, pipe.text_encoder),
                (pipe.tokenizer_2, pipe.text_encoder_2),
            )
        )
        both = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        embeds = join_chunks(both, reading.chunks)
        pooled = second.text_embeds[:: reading.chunks]
        if pipe.config.force_zeros_for_empty_prompt:
            is_empty = send(torch.tensor([not prompt for prompt in prompts]), pooled.device)
            embeds = embeds.masked_fill(is_empty[:, None, None], 0)
            pooled = pooled.masked_fill(is_empty[:, None], 0)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def predict(self, denoiser: nn.Module, noised: Noised, batch: Batch) -> Tensor:
        dtype = frozen_dtype(denoiser)
        added = {
            "text_embeds": batch.conditioning["pooled_prompt_embeds"].to(dtype),
            # Kept in float32: bfloat16 rounds whole numbers above 256.
            "time_ids": batch.size_ids,
        }
        return denoiser(
            noised.noisy_latents.to(dtype),
            noised.timesteps,
            encoder_hidden_states=batch.conditioning["prompt_embeds"].to(dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def kohya_key(self, component: str, module: str) -> str:
        """Returns the key with Stability's block numbers, which programs expect for SDXL."""
        return super().kohya_key(component, to_ldm(module) if component == "unet" else module)

    def metadata(self, prediction_type: str) -> dict[str, Any]:
        return {
            "ss_base_model_version": "sdxl_base_v1-0",
            "ss_v2": False,
            "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        }

"""Stable Diffusion XL: two text encoders, and a UNet that is told each picture's size and crop (Podell et al. 2023, arXiv:2307.01952)."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from trainer.families.base import PLAIN_READING, Batch, Conditioning, Reading
from trainer.families.latent_diffusion import LatentDiffusion, frozen_dtype, side_by_side, token_ids
from trainer.families.objective import Noised
from trainer.lora.formats.stability_names import LAYERS_PER_BLOCK, to_ldm
from trainer.models.device import send
from trainer.models.model_files import BaseFiles


class StableDiffusionXL(LatentDiffusion):
    name = "Stable Diffusion XL"
    metadata_prefixes = ("sdxl", "stable-diffusion-xl")
    open_clip = ("text_encoder_2",)
    text_width = 2048
    pipeline_class = StableDiffusionXLPipeline
    pipeline_options = {"feature_extractor": None, "image_encoder": None}
    text_encoder_keys = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    embedding_keys = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    skips_layers = False  # always the penultimate one

    def matches_base(self, files: BaseFiles) -> bool:
        """Smaller UNets in the same pipeline have other block numbers in the file, which no other program would read."""
        return (
            files.pipeline == "StableDiffusionXLPipeline"
            and files.configs["unet"].get("layers_per_block", 2) == LAYERS_PER_BLOCK
        )

    def matches_adapter_keys(self, paths: Collection[str]) -> bool:
        return all(
            any(path.startswith(part) for path in paths) for part in ("unet.", "text_encoder_2.")
        )

    def encode_prompts(
        self, pipe: Any, prompts: Sequence[str], reading: Reading = PLAIN_READING
    ) -> Conditioning:
        """prompt_embeds [B, 77 x chunks, 2048]: the penultimate layers of both encoders side by side;
        pooled_prompt_embeds [B, 1280] of the second encoder and the first chunk.

        An empty prompt is all zeros where the pipeline says so, as its sampler has it for the missing negative prompt.
        The last layer of the first encoder is read by nobody; an adapter there stays zero.
        """
        pairs = ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2))
        first, second = (
            encoder(
                send(
                    token_ids(tokenizer, reading.spelled(prompts), reading.chunks), encoder.device
                ),
                output_hidden_states=True,
            )
            for tokenizer, encoder in pairs
        )
        prompt_embeds = side_by_side(
            torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), reading.chunks
        )
        pooled = second.text_embeds[:: reading.chunks]
        if pipe.config.force_zeros_for_empty_prompt:
            empty = send(torch.tensor([not prompt for prompt in prompts]), pooled.device)
            prompt_embeds, pooled = (
                prompt_embeds.masked_fill(empty[:, None, None], 0),
                pooled.masked_fill(empty[:, None], 0),
            )
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}

    def predict(self, denoiser: nn.Module, noised: Noised, batch: Batch) -> Tensor:
        """The sizes stay in float32: bfloat16 has no whole numbers above 256 but every second, fourth, ... one."""
        dtype = frozen_dtype(denoiser)
        added = {
            "text_embeds": batch.conditioning["pooled_prompt_embeds"].to(dtype),
            "time_ids": batch.size_ids,
        }
        return denoiser(
            noised.noisy_latents.to(dtype),
            noised.timesteps,
            encoder_hidden_states=batch.conditioning["prompt_embeds"].to(dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def export_key(self, component: str, module: str) -> str:
        return super().export_key(component, to_ldm(module) if component == "unet" else module)

    def metadata(self, prediction_type: str) -> dict[str, Any]:
        return {
            "ss_base_model_version": "sdxl_base_v1-0",
            "ss_v2": False,
            "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        }

"""Stable Diffusion 3 and 3.5: a transformer over image and text together, trained by flow matching (Esser et al. 2024, arXiv:2403.03206).

Captions are read by two CLIP encoders and by T5; a model without T5 has zeros in its place, as in its pipeline.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn.functional import pad

from trainer.families.base import PLAIN_READING, Batch, Conditioning, Reading
from trainer.families.latent_diffusion import LatentDiffusion, frozen_dtype, token_ids
from trainer.families.objective import FlowMatchingObjective, Noised
from trainer.lora.formats.stability_names import to_mmdit
from trainer.models.device import send
from trainer.models.model_files import BaseFiles

T5_TOKENS = 256  # as in the pipeline, so that training and samples see the same
TOPS = (
    "transformer_blocks.",
    "context_embedder",
    "time_text_embed",
    "pos_embed",
    "norm_out",
    "proj_out",
)  # of its transformer
SIZES = {
    "3m": ("Stable Diffusion 3 Medium", "stable-diffusion-3-m"),
    "35m": ("Stable Diffusion 3.5 Medium", "stable-diffusion-3-5-medium"),
    "35l": ("Stable Diffusion 3.5 Large", "stable-diffusion-3-5-large"),
}


class StableDiffusion3(LatentDiffusion):
    """The three published models differ in what their blocks are made of, so that an adapter of one does not fit another."""

    pipeline_class = StableDiffusion3Pipeline
    pipeline_options = {"feature_extractor": None, "image_encoder": None}
    denoiser_name = "transformer"
    text_width = 0
    text_encoder_keys = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    embedding_keys = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    dialect = "diffusers"
    skips_layers = False  # always the penultimate ones
    reads_in_chunks = False  # what is long is T5's

    def __init__(self, size: str) -> None:
        self.name, self.architecture = SIZES[size]
        self.metadata_prefixes = (self.architecture,)
        self.size = size

    def matches_base(self, files: BaseFiles) -> bool:
        if files.pipeline != "StableDiffusion3Pipeline":
            return False
        config = files.configs["transformer"]
        return self.size == (
            "35m"
            if config.get("dual_attention_layers")
            else "35l"
            if config.get("qk_norm")
            else "3m"
        )

    def matches_adapter_keys(self, paths: Collection[str]) -> bool:
        inside = [
            path.removeprefix("transformer.") for path in paths if path.startswith("transformer.")
        ]
        return bool(inside) and all(path.startswith(TOPS) for path in inside)

    def text_encoders(self, pipe: Any) -> dict[str, nn.Module]:
        t5 = {} if pipe.text_encoder_3 is None else {"text_encoder_3": pipe.text_encoder_3}
        return self.trainable_text_encoders(pipe) | t5

    def trainable_text_encoders(self, pipe: Any) -> dict[str, nn.Module]:
        return super().text_encoders(pipe)

    def objective(self, pipe: Any) -> FlowMatchingObjective:
        return FlowMatchingObjective.from_scheduler(pipe.scheduler)

    def encode_prompts(
        self, pipe: Any, prompts: Sequence[str], reading: Reading = PLAIN_READING
    ) -> Conditioning:
        """prompt_embeds [B, 77 + 256, 4096]: the penultimate layers of both CLIP encoders side by side, then T5;
        pooled_prompt_embeds [B, 2048]: the projections of both CLIP encoders."""
        clips = [
            encoder(
                send(token_ids(tokenizer, reading.spelled(prompts)), encoder.device),
                output_hidden_states=True,
            )
            for tokenizer, encoder in (
                (pipe.tokenizer, pipe.text_encoder),
                (pipe.tokenizer_2, pipe.text_encoder_2),
            )
        ]
        clip_embeds = torch.cat([clip.hidden_states[-2] for clip in clips], dim=-1)
        t5_embeds = self._t5(pipe, prompts).to(clip_embeds)
        clip_embeds = pad(clip_embeds, (0, t5_embeds.shape[-1] - clip_embeds.shape[-1]))
        return {
            "prompt_embeds": torch.cat([clip_embeds, t5_embeds], dim=1),
            "pooled_prompt_embeds": torch.cat([clip.text_embeds for clip in clips], dim=-1),
        }

    def _t5(self, pipe: Any, prompts: Sequence[str]) -> Tensor:
        if pipe.text_encoder_3 is None:
            return torch.zeros(len(prompts), T5_TOKENS, pipe.transformer.config.joint_attention_dim)
        tokens = pipe.tokenizer_3(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=T5_TOKENS,
            return_tensors="pt",
        )
        with torch.no_grad():  # never trained, even where the CLIP encoders are
            return pipe.text_encoder_3(send(tokens.input_ids, pipe.text_encoder_3.device))[0]

    def token_counts(self, pipe: Any, prompts: Sequence[str]) -> tuple[list[int], int]:
        """T5 reads what is beyond CLIP's 77 tokens; without it, nothing does."""
        if pipe.text_encoder_3 is None:
            return super().token_counts(pipe, prompts)
        return [
            len(tokens) - 1
            for tokens in pipe.tokenizer_3(list(prompts), truncation=False, verbose=False).input_ids
        ], T5_TOKENS - 1

    def predict(self, denoiser: nn.Module, noised: Noised, batch: Batch) -> Tensor:
        dtype = frozen_dtype(denoiser)
        return denoiser(
            noised.noisy_latents.to(dtype),
            timestep=noised.timesteps,
            encoder_hidden_states=batch.conditioning["prompt_embeds"].to(dtype),
            pooled_projections=batch.conditioning["pooled_prompt_embeds"].to(dtype),
            return_dict=False,
        )[0]

    def fused(self, module: str) -> tuple[str, int | None]:
        return to_mmdit(module)

    def export_key(self, component: str, module: str) -> str:
        return super().export_key(
            component, to_mmdit(module)[0] if component == self.denoiser_name else module
        )

    def metadata(self, prediction_type: str) -> dict[str, Any]:
        return {
            "ss_base_model_version": "sd3",
            "ss_v2": False,
            "modelspec.architecture": f"{self.architecture}/lora",
        }

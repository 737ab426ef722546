"""Stable Diffusion 3 and 3.5: a transformer over image and text, trained by flow matching.

Captions are encoded by two CLIP encoders and T5. If a model has no T5, its part of the text is
zero, as in the diffusers pipeline. Source: Esser et al. 2024, arXiv:2403.03206.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

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

T5_TOKENS = 256  # the default of the pipeline, so that training and samples use the same text
TRANSFORMER_PATHS = (
    "transformer_blocks.",
    "context_embedder",
    "time_text_embed",
    "pos_embed",
    "norm_out",
    "proj_out",
)
"""How the paths of all its layers start."""


class Names(NamedTuple):
    """How a model is called on the page, and in `modelspec.architecture`."""

    shown: str
    architecture: str


SIZES = {
    "3m": Names("Stable Diffusion 3 Medium", "stable-diffusion-3-m"),
    "35m": Names("Stable Diffusion 3.5 Medium", "stable-diffusion-3-5-medium"),
    "35l": Names("Stable Diffusion 3.5 Large", "stable-diffusion-3-5-large"),
}


class StableDiffusion3(LatentDiffusion):
    """One of the three published models, a key of SIZES.

    They have different blocks, so an adapter of one does not fit another.
    """

    pipeline_class = StableDiffusion3Pipeline
    pipeline_options = {"feature_extractor": None, "image_encoder": None}
    denoiser_name = "transformer"
    text_width = 0
    text_encoder_keys = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    embedding_keys = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    default_format = "diffusers"
    supports_clip_skip = False  # always the penultimate layers
    supports_long_captions = False  # T5 encodes the tokens behind CLIP's 77

    def __init__(self, size: str) -> None:
        self.size = size
        self.name, self.architecture = SIZES[size]
        self.metadata_prefixes = (self.architecture,)

    def matches_base(self, files: BaseFiles) -> bool:
        if files.pipeline != "StableDiffusion3Pipeline":
            return False
        config = files.configs["transformer"]
        if config.get("dual_attention_layers"):
            return self.size == "35m"
        return self.size == ("35l" if config.get("qk_norm") else "3m")

    def matches_adapter_keys(self, paths: Collection[str]) -> bool:
        """Returns whether a transformer is adapted and all its layers have names of this one.

        All three models match, because their layers have the same names.
        """
        layers = [
            path.removeprefix("transformer.") for path in paths if path.startswith("transformer.")
        ]
        return bool(layers) and all(path.startswith(TRANSFORMER_PATHS) for path in layers)

    def text_encoders(self, pipe: Any) -> dict[str, nn.Module]:
        t5 = {} if pipe.text_encoder_3 is None else {"text_encoder_3": pipe.text_encoder_3}
        return self.trainable_text_encoders(pipe) | t5

    def trainable_text_encoders(self, pipe: Any) -> dict[str, nn.Module]:
        """Returns the CLIP encoders; T5 is larger than everything else and never trained."""
        return super().text_encoders(pipe)

    def objective(self, pipe: Any) -> FlowMatchingObjective:
        return FlowMatchingObjective.from_scheduler(pipe.scheduler)

    def encode_prompts(
        self, pipe: Any, prompts: Sequence[str], reading: Reading = PLAIN_READING
    ) -> Conditioning:
        """Returns prompt_embeds [B, 77 + 256, 4096] and pooled_prompt_embeds [B, 2048].

        prompt_embeds are the penultimate layers of both CLIP encoders, concatenated and padded to
        the width of T5, followed by T5's tokens. pooled_prompt_embeds are the projections of both
        CLIP encoders.
        """
        texts = reading.with_placeholders(prompts)
        clips = [
            encoder(
                send(token_ids(tokenizer, texts), encoder.device),
                output_hidden_states=True,
            )
            for tokenizer, encoder in (
                (pipe.tokenizer, pipe.text_encoder),
                (pipe.tokenizer_2, pipe.text_encoder_2),
            )
        ]
        clip_embeds = torch.cat([clip.hidden_states[-2] for clip in clips], dim=-1)
        t5_embeds = self._encode_t5(pipe, prompts).to(clip_embeds)
        clip_embeds = pad(clip_embeds, (0, t5_embeds.shape[-1] - clip_embeds.shape[-1]))
        return {
            "prompt_embeds": torch.cat([clip_embeds, t5_embeds], dim=1),
            "pooled_prompt_embeds": torch.cat([clip.text_embeds for clip in clips], dim=-1),
        }

    def _encode_t5(self, pipe: Any, prompts: Sequence[str]) -> Tensor:
        """Returns the last layer of T5, [B, 256, 4096], or zeros on the CPU without T5."""
        if pipe.text_encoder_3 is None:
            return torch.zeros(len(prompts), T5_TOKENS, pipe.transformer.config.joint_attention_dim)
        tokens = pipe.tokenizer_3(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=T5_TOKENS,
            return_tensors="pt",
        )
        with torch.no_grad():  # never trained, even if the CLIP encoders are
            return pipe.text_encoder_3(send(tokens.input_ids, pipe.text_encoder_3.device))[0]

    def token_counts(self, pipe: Any, prompts: Sequence[str]) -> tuple[list[int], int]:
        """Counts the tokens of T5 if the model has one, else CLIP's.

        T5 has an end token and no start token.
        """
        if pipe.text_encoder_3 is None:
            return super().token_counts(pipe, prompts)
        tokenized = pipe.tokenizer_3(list(prompts), truncation=False, verbose=False).input_ids
        return [len(tokens) - 1 for tokens in tokenized], T5_TOKENS - 1

    def predict(self, denoiser: nn.Module, noised: Noised, batch: Batch) -> Tensor:
        dtype = frozen_dtype(denoiser)
        return denoiser(
            noised.noisy_latents.to(dtype),
            timestep=noised.timesteps,
            encoder_hidden_states=batch.conditioning["prompt_embeds"].to(dtype),
            pooled_projections=batch.conditioning["pooled_prompt_embeds"].to(dtype),
            return_dict=False,
        )[0]

    def fused_projection(self, module: str) -> tuple[str, int | None]:
        return to_mmdit(module)

    def kohya_key(self, component: str, module: str) -> str:
        """Returns the key with Stability's layer names."""
        is_denoiser = component == self.denoiser_name
        return super().kohya_key(component, to_mmdit(module)[0] if is_denoiser else module)

    def metadata(self, prediction_type: str) -> dict[str, Any]:
        return {
            "ss_base_model_version": "sd3",
            "ss_v2": False,
            "modelspec.architecture": f"{self.architecture}/lora",
        }

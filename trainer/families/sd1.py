"""Stable Diffusion 1.x: a UNet, one CLIP text encoder, epsilon or v prediction."""

from collections.abc import Sequence
from typing import Any

from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from trainer.families.base import Conditioning
from trainer.objective import DiffusionObjective, Noised


class StableDiffusion1:
    name = "Stable Diffusion 1.x"
    pipeline_class = StableDiffusionPipeline
    base_model_version = "sd_v1"
    architecture = "stable-diffusion-v1/lora"
    denoiser_targets = ("to_q", "to_k", "to_v", "to_out.0")
    text_encoder_targets = ("q_proj", "k_proj", "v_proj", "out_proj")

    def denoiser(self, pipe: Any) -> nn.Module:
        return pipe.unet

    def text_encoders(self, pipe: Any) -> dict[str, nn.Module]:
        return {"text_encoder": pipe.text_encoder}

    def objective(self, pipe: Any) -> DiffusionObjective:
        return DiffusionObjective.from_scheduler(pipe.scheduler)

    def _tokens(self, pipe: Any, prompts: Sequence[str]) -> Tensor:
        return pipe.tokenizer(list(prompts), padding="max_length", truncation=True,
                              max_length=pipe.tokenizer.model_max_length, return_tensors="pt").input_ids

    def encode_prompts(self, pipe: Any, prompts: Sequence[str]) -> Conditioning:
        return {"prompt_embeds": pipe.text_encoder(self._tokens(pipe, prompts).to(pipe.text_encoder.device))[0]}

    def token_counts(self, pipe: Any, prompts: Sequence[str]) -> tuple[list[int], int]:
        tokenized = pipe.tokenizer(list(prompts), truncation=False, verbose=False).input_ids
        return [len(tokens) - 2 for tokens in tokenized], pipe.tokenizer.model_max_length - 2

    def predict(self, denoiser: nn.Module, noised: Noised, conditioning: Conditioning) -> Tensor:
        dtype = next(p.dtype for p in denoiser.parameters() if not p.requires_grad)
        return denoiser(noised.noisy_latents.to(dtype), noised.timesteps,
                        encoder_hidden_states=conditioning["prompt_embeds"].to(dtype), return_dict=False)[0]

    def export_key(self, component: str, module: str) -> str:
        path = module.replace(".", "_")
        if component == "unet":
            return f"lora_unet_{path}"
        # The level `text_model` left the module in transformers 5.6, but every reader still expects it in the key.
        return f"lora_te_text_model_{path.removeprefix('text_model_')}"

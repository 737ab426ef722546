"""What the UNet families have in common: latents of a VAE, CLIP text encoders, epsilon or v prediction."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from trainer.families.base import PLAIN_READING, Batch, Conditioning, Reading, denoiser_of
from trainer.families.objective import DiffusionObjective, Noised, Objective
from trainer.models.device import send


class LatentDiffusion:
    """With one text encoder, as in Rombach et al. 2022 (arXiv:2112.10752)."""

    pipeline_class: Any = StableDiffusionPipeline
    pipeline_options: Mapping[str, Any] = {
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
        "requires_safety_checker": False,
    }
    denoiser_name = "unet"
    text_encoder_keys: Mapping[str, str] = {"text_encoder": "lora_te"}
    """How kohya files name each text encoder."""
    embedding_keys: Mapping[str, str] = {"text_encoder": "emb_params"}
    dialect: Literal["kohya", "diffusers"] = "kohya"
    open_clip: Sequence[str] = ()
    skips_layers = True
    reads_in_chunks = True

    def matches_adapter_keys(self, paths: Collection[str]) -> bool:
        return False  # the width of the text tells it, or nothing does

    def denoiser(self, pipe: Any) -> nn.Module:
        return denoiser_of(pipe)

    def text_encoders(self, pipe: Any) -> dict[str, nn.Module]:
        return {name: getattr(pipe, name) for name in self.text_encoder_keys}

    def trainable_text_encoders(self, pipe: Any) -> dict[str, nn.Module]:
        return self.text_encoders(pipe)

    def objective(self, pipe: Any) -> Objective:
        return DiffusionObjective.from_scheduler(pipe.scheduler)

    def encode_prompts(
        self, pipe: Any, prompts: Sequence[str], reading: Reading = PLAIN_READING
    ) -> Conditioning:
        """prompt_embeds [B, 77 x chunks, D]: the last layer, or an earlier one with the last layer's norm on it, as A1111 has it."""
        encoder = pipe.text_encoder
        ids = send(
            token_ids(pipe.tokenizer, reading.spelled(prompts), reading.chunks), encoder.device
        )
        if reading.clip_skip == 1:
            embeds = encoder(ids)[0]
        else:
            hidden_states = encoder(ids, output_hidden_states=True).hidden_states
            embeds = getattr(encoder, "text_model", encoder).final_layer_norm(
                hidden_states[-reading.clip_skip]
            )
        return {"prompt_embeds": side_by_side(embeds, reading.chunks)}

    def token_counts(self, pipe: Any, prompts: Sequence[str]) -> tuple[list[int], int]:
        tokenized = pipe.tokenizer(list(prompts), truncation=False, verbose=False).input_ids
        return [len(tokens) - 2 for tokens in tokenized], pipe.tokenizer.model_max_length - 2

    def predict(self, denoiser: nn.Module, noised: Noised, batch: Batch) -> Tensor:
        dtype = frozen_dtype(denoiser)
        return denoiser(
            noised.noisy_latents.to(dtype),
            noised.timesteps,
            encoder_hidden_states=batch.conditioning["prompt_embeds"].to(dtype),
            return_dict=False,
        )[0]

    def fused(self, module: str) -> tuple[str, int | None]:
        return module, None

    def export_key(self, component: str, module: str) -> str:
        path = module.replace(".", "_")
        if component == self.denoiser_name:
            return f"lora_unet_{path}"
        # The level `text_model` left some modules in transformers 5.6, but every reader still expects it in the key.
        return f"{self.text_encoder_keys[component]}_text_model_{path.removeprefix('text_model_')}"


def token_ids(tokenizer: Any, prompts: Sequence[str], chunks: int = 1) -> Tensor:
    """[B x chunks, 77], cut or padded to what the encoder reads; the chunks of a prompt follow one another."""
    length = tokenizer.model_max_length
    if chunks == 1:
        return tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        ).input_ids
    rows = []
    for words in tokenizer(
        list(prompts), add_special_tokens=False, truncation=False, verbose=False
    ).input_ids:
        for start in range(0, chunks * (length - 2), length - 2):
            row = [
                tokenizer.bos_token_id,
                *words[start : start + length - 2],
                tokenizer.eos_token_id,
            ]
            rows.append(row + [tokenizer.pad_token_id] * (length - len(row)))
    return torch.tensor(rows)


def side_by_side(embeds: Tensor, chunks: int) -> Tensor:
    """[B x chunks, 77, D] -> [B, chunks x 77, D]."""
    return embeds.reshape(-1, chunks * embeds.shape[1], embeds.shape[2])


def frozen_dtype(denoiser: nn.Module) -> torch.dtype:
    """That of the base's weights; the adapter's are always float32."""
    return next(
        p.dtype for p in denoiser.parameters() if not p.requires_grad and p.is_floating_point()
    )

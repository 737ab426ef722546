"""The defaults of a family: latents of a VAE, one CLIP text encoder, epsilon or v prediction."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from trainer.families.base import PLAIN_READING, Batch, Conditioning, Reading, denoiser_of
from trainer.families.objective import DiffusionObjective, Noised, Objective
from trainer.models.device import send


class LatentDiffusion:
    """A UNet with one text encoder, as in Rombach et al. 2022 (arXiv:2112.10752).

    The base class of all families. A subclass adds `name`, `text_width`, `metadata_prefixes`,
    `matches_base` and `metadata`; `ModelFamily` documents all of them.
    """

    pipeline_class: Any = StableDiffusionPipeline
    pipeline_options: Mapping[str, Any] = {
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
        "requires_safety_checker": False,
    }
    denoiser_name = "unet"
    text_encoder_keys: Mapping[str, str] = {"text_encoder": "lora_te"}
    """Component of each CLIP text encoder -> its prefix in kohya files."""
    embedding_keys: Mapping[str, str] = {"text_encoder": "emb_params"}
    default_format: Literal["kohya", "diffusers"] = "kohya"
    open_clip_encoders: Sequence[str] = ()
    supports_clip_skip = True
    supports_long_captions = True

    def matches_adapter_keys(self, paths: Collection[str]) -> bool:
        """Returns False: adapters of these families differ only in `text_width`."""
        return False

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
        """Returns prompt_embeds [B, 77 x chunks, D] from the last layer.

        With clip skip they come from an earlier layer, followed by the final norm as in A1111.
        """
        encoder = pipe.text_encoder
        texts = reading.with_placeholders(prompts)
        ids = send(token_ids(pipe.tokenizer, texts, reading.chunks), encoder.device)
        if reading.clip_skip == 1:
            embeds = encoder(ids)[0]
        else:
            states = encoder(ids, output_hidden_states=True).hidden_states
            final_norm = getattr(encoder, "text_model", encoder).final_layer_norm
            embeds = final_norm(states[-reading.clip_skip])
        return {"prompt_embeds": join_chunks(embeds, reading.chunks)}

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

    def fused_projection(self, module: str) -> tuple[str, int | None]:
        return module, None

    def kohya_key(self, component: str, module: str) -> str:
        path = module.replace(".", "_")
        if component == self.denoiser_name:
            return f"lora_unet_{path}"
        # Since transformers 5.6 some encoders lack the level `text_model`, but every program that
        # loads the file still expects it.
        return f"{self.text_encoder_keys[component]}_text_model_{path.removeprefix('text_model_')}"


def token_ids(tokenizer: Any, prompts: Sequence[str], chunks: int = 1) -> Tensor:
    """Returns the tokens of each prompt, cut or padded, [B x chunks, 77].

    Each row has a start and an end token. The chunks of one prompt are consecutive rows.
    """
    length = tokenizer.model_max_length
    if chunks == 1:
        return tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        ).input_ids
    tokenized = tokenizer(list(prompts), add_special_tokens=False, truncation=False, verbose=False)
    start, end, padding = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    per_chunk = length - 2
    rows = []
    for tokens in tokenized.input_ids:
        for first in range(0, chunks * per_chunk, per_chunk):
            row = [start, *tokens[first : first + per_chunk], end]
            rows.append(row + [padding] * (length - len(row)))
    return torch.tensor(rows)


def join_chunks(embeds: Tensor, chunks: int) -> Tensor:
    """Concatenates the chunks of each prompt: [B x chunks, 77, D] to [B, chunks x 77, D]."""
    return embeds.reshape(-1, chunks * embeds.shape[1], embeds.shape[2])


def frozen_dtype(denoiser: nn.Module) -> torch.dtype:
    """Returns the dtype of the base's weights; the adapter's weights are always float32."""
    return next(
        p.dtype for p in denoiser.parameters() if not p.requires_grad and p.is_floating_point()
    )

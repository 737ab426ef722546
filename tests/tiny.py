"""Tiny pipelines of real diffusers classes with random weights, and small datasets for them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

TEXT_WIDTH = 32


def byte_vocabulary() -> dict[str, int]:
    """Returns CLIP's byte-level alphabet without merges: any text becomes one token per byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    words = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return {word: index for index, word in enumerate(words)}


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(byte_vocabulary()), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def tiny_unet(**changes: Any) -> UNet2DConditionModel:
    settings = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**(settings | changes))


def tiny_vae(**changes: Any) -> AutoencoderKL:
    settings = {
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "sample_size": 16,
    }
    return AutoencoderKL(**(settings | changes))


def tiny_text_config(**changes: Any) -> CLIPTextConfig:
    vocabulary = byte_vocabulary()
    return CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=TEXT_WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
        **changes,
    )


SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def tiny_sd1(work: Path) -> StableDiffusionPipeline:
    """Returns a Stable Diffusion 1.x with 0.2 million weights: 16-pixel images, 8 x 8 latents."""
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **SCHEDULE)
    return StableDiffusionPipeline(
        unet=tiny_unet(),
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(tiny_text_config()),
        tokenizer=tiny_tokenizer(work / "words"),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_sd2(work: Path, prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """Returns a Stable Diffusion 2.x: linear projections, heads by block, OpenCLIP's activation."""
    scheduler = DDIMScheduler(
        clip_sample=False, set_alpha_to_one=False, prediction_type=prediction_type, **SCHEDULE
    )
    text_encoder = CLIPTextModel(tiny_text_config(hidden_act="gelu", projection_dim=16))
    return StableDiffusionPipeline(
        unet=tiny_unet(use_linear_projection=True, attention_head_dim=(2, 4)),
        vae=tiny_vae(),
        text_encoder=text_encoder,
        tokenizer=tiny_tokenizer(work / "words"),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_sdxl(work: Path, **schedule: Any) -> StableDiffusionXLPipeline:
    """Returns a Stable Diffusion XL.

    It has attention only in the inner blocks, two text encoders, and six size numbers with eight
    channels each.
    """
    unet = tiny_unet(
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=2 * TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )
    return StableDiffusionXLPipeline(
        unet=unet,
        vae=tiny_vae(force_upcast=True, scaling_factor=0.13025),
        scheduler=EulerDiscreteScheduler(**SCHEDULE, **schedule),
        text_encoder=CLIPTextModel(tiny_text_config()),
        text_encoder_2=CLIPTextModelWithProjection(
            tiny_text_config(hidden_act="gelu", projection_dim=24)
        ),
        tokenizer=tiny_tokenizer(work / "words"),
        tokenizer_2=tiny_tokenizer(work / "words_2"),
    )


def tiny_t5() -> tuple[T5EncoderModel, T5TokenizerFast]:
    """Returns a T5 whose vocabulary is the printable characters below 600."""
    letters = sorted({chr(code) for code in range(33, 600) if chr(code).isprintable()})
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *letters]
    tokenizer = T5TokenizerFast(
        vocab=[(piece, 0.0 if piece.startswith("<") else -2.0) for piece in pieces]
    )
    shape = {
        "d_model": 2 * TEXT_WIDTH,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 1,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
    }
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), **shape)), tokenizer


def tiny_sd3(
    work: Path, t5: bool = True, shift: float = 3.0, **changes: Any
) -> StableDiffusion3Pipeline:
    """Returns a Stable Diffusion 3: two blocks, 16 latent channels, patches of two by two.

    T5 is as wide as both CLIP encoders together.
    """
    settings = {
        "sample_size": 8,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 2 * TEXT_WIDTH,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 16 + 24,
        "pos_embed_max_size": 16,
    }
    text_encoder_3, tokenizer_3 = tiny_t5() if t5 else (None, None)
    plain = {"use_quant_conv": False, "use_post_quant_conv": False}
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**(settings | changes)),
        vae=tiny_vae(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, **plain),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        text_encoder=CLIPTextModelWithProjection(tiny_text_config(projection_dim=16)),
        text_encoder_2=CLIPTextModelWithProjection(
            tiny_text_config(hidden_act="gelu", projection_dim=24)
        ),
        text_encoder_3=text_encoder_3,
        tokenizer=tiny_tokenizer(work / "words"),
        tokenizer_2=tiny_tokenizer(work / "words_2"),
        tokenizer_3=tokenizer_3,
    )


TINY: dict[str, Callable[[Path], Any]] = {
    "sd1": tiny_sd1,
    "sd2": tiny_sd2,
    "sd2-v": lambda work: tiny_sd2(work, "v_prediction"),
    "sdxl": tiny_sdxl,
    "sdxl-v": lambda work: tiny_sdxl(
        work,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    ),
    "sd3": tiny_sd3,
    "sd35-medium": lambda work: tiny_sd3(
        work, t5=False, qk_norm="rms_norm", dual_attention_layers=(0,)
    ),
    "sd35-large": lambda work: tiny_sd3(work, qk_norm="rms_norm"),
}


def save_tiny_base(folder: Path, seed: int = 0, kind: str = "sd1") -> Path:
    """Saves a tiny pipeline with random weights as a model folder.

    The folder includes the vocabulary, although transformers writes only tokenizer.json.
    """
    torch.manual_seed(seed)
    TINY[kind](folder.parent / f"{folder.name}-work").save_pretrained(folder)
    return folder


def make_dataset(
    folder: Path, count: int = 4, sizes: tuple[tuple[int, int], ...] = ((16, 16),)
) -> Path:
    """Writes images of random colours with captions; their sizes alternate."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for index in range(count):
        width, height = sizes[index % len(sizes)]
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(f"picture number {index}", encoding="utf-8")
    return folder

"""The section [base] of the settings."""

from typing import Literal

from pydantic import Field

from trainer.config.settings.section import EMBEDDED, Section


class Base(Section):
    """The base model on which the adapter is trained."""

    model: str = Field(default=EMBEDDED, title="Base model")
    """"embedded" for the small model that ships with the program, the path of a .safetensors
    file or of a diffusers folder, or a Hugging Face id such as
    stable-diffusion-v1-5/stable-diffusion-v1-5."""

    revision: str = Field(default="", title="Hugging Face revision")
    """Branch, tag or commit of a Hugging Face model. Empty: the main branch."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", title="Mixed precision"
    )
    """Number format of the frozen base model. auto: bf16 on a GPU that supports it, fp16 on any
    other GPU, and fp32 on a CPU. The adapter itself is always trained in float32."""

    quantization: Literal["none", "8bit", "4bit"] = Field(
        default="none", title="Quantization (QLoRA)"
    )
    """Stores the linear layers of the frozen denoiser in 8 or 4 bits during training (Dettmers
    et al. 2023, arXiv:2305.14314). They need half or a quarter of the memory, but training is
    slower and a little less exact. Needs an NVIDIA GPU and the bitsandbytes package."""

    t5: bool = Field(default=True, title="T5 text encoder")
    """Stable Diffusion 3 only: also encodes captions with T5, its third and largest text
    encoder. Off saves 10 GB of download and memory, but long captions are understood less well,
    in training and in samples."""

    vae: str = Field(default="", title="VAE")
    """Replaces the VAE of the base model: a .safetensors file, a diffusers folder or a Hugging
    Face id. Empty: the VAE of the base model."""

    prediction: Literal["auto", "epsilon", "v"] = Field(default="auto", title="Prediction type")
    """What the base model predicts: the noise (epsilon) or the velocity (v). auto: as its files
    specify. Change this only if they do not, or if samples of the plain base model are noise."""

    zero_terminal_snr: Literal["auto", "on", "off"] = Field(
        default="auto", title="Zero terminal SNR"
    )
    """Whether the last timestep of the noise schedule is pure noise (Lin et al. 2024,
    arXiv:2305.08891), as in many models with v prediction. auto: as the files of the base model
    specify."""

    clip_skip: int = Field(default=1, title="CLIP skip", ge=1, le=12)
    """Which layer of the text encoder is used, counted from the end: 1 is the last layer. Most
    anime models were trained with 2. For Stable Diffusion 1.x and 2.x only."""

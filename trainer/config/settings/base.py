"""The section [base]."""

from typing import Annotated, Literal

from pydantic import Field

from trainer.config.settings.section import EMBEDDED, Section


class Base(Section):
    """The model the adapter is trained on."""

    model: str = EMBEDDED
    """"embedded" for the small model that ships with the program, the path of a .safetensors checkpoint or of a diffusers folder, or a Hugging Face id such as stable-diffusion-v1-5/stable-diffusion-v1-5."""
    revision: str = ""
    """Branch, tag or commit of a Hugging Face model. Empty: the main one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the frozen base. auto: bf16 where the GPU has it, else fp16 on a GPU and fp32 on a CPU. The adapter itself is always trained in float32."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Hold the linear layers of the frozen denoiser in 8 or 4 bits while training (QLoRA, Dettmers et al. 2023, arXiv:2305.14314): half or a quarter of their memory, slower and a little less exact. Needs an NVIDIA GPU and the bitsandbytes package."""
    t5: bool = True
    """Stable Diffusion 3 only: read captions with T5 too, its third and largest text encoder. Off saves 10 GB of download and memory; long captions are then understood less well, in training and in samples."""
    vae: str = ""
    """Another VAE than the base's own: a .safetensors file, a diffusers folder or a Hugging Face id. Empty: the base's own."""
    prediction: Literal["auto", "epsilon", "v"] = "auto"
    """What the base predicts. auto: what its files say. Choose only where they do not, or where the samples of the plain base are noise."""
    zero_terminal_snr: Literal["auto", "on", "off"] = "auto"
    """Whether the last step of the base's schedule is pure noise (Lin et al. 2024, arXiv:2305.08891), as in many models with v prediction. auto: what its files say."""
    clip_skip: Annotated[int, Field(ge=1, le=12)] = 1
    """Which layer of the text encoder is read, counted from its end: 1 is the last; 2 for most models drawn from anime, which were trained so. For Stable Diffusion 1.x and 2.x only."""

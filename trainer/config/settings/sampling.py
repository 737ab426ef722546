"""The section [sampling] of the settings."""

from typing import Literal

from pydantic import Field

from trainer.config.settings.section import Section


class Sampling(Section):
    """The samples that are generated at every save, with the adapter and with the base alone."""

    prompts: tuple[str, ...] = Field(default=(), title="Sample prompts", max_length=16)
    """One prompt per line. Empty: the trigger word and the caption of the first image."""

    negative_prompt: str = Field(default="", title="Negative prompt")
    """What should not appear in the samples."""

    inference_steps: int = Field(default=20, title="Sampling steps", ge=1, le=150)
    """Denoising steps per sample."""

    guidance_scale: float = Field(default=7.0, title="CFG scale", ge=1, le=30)
    """How closely a sample follows its prompt."""

    sampler: Literal[
        "auto", "DPM++ 2M", "DPM++ 2M Karras", "Euler", "Euler a", "Heun", "DDIM", "UniPC"
    ] = Field(default="auto", title="Sampling method")
    """By the names of A1111. auto: DPM++ 2M, or Euler for Stable Diffusion 3, which supports only
    Euler and Heun. Heun cannot start from the pure noise of a base model with zero terminal
    SNR."""

    seed: int = Field(default=1, title="Seed", ge=0, le=2**32 - 1)
    """Seed of the first sample. The second uses the next seed, and so on. The seeds stay the same
    during the run, so that only the adapter changes."""

    vae_tiling: bool = Field(default=False, title="VAE tiling")
    """Decodes the latents of a sample tile by tile: far less memory at 1024 pixels, but faint
    differences between the tiles. Does not affect the training."""

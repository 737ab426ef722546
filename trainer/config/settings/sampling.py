"""The section [sampling]."""

from typing import Annotated, Literal

from pydantic import Field

from trainer.config.settings.section import Section


class Sampling(Section):
    """The pictures made at every save, beside those of the base."""

    prompts: Annotated[tuple[str, ...], Field(max_length=16)] = ()
    """One prompt a line. Empty: the trigger word and the caption of the first picture."""
    negative_prompt: str = ""
    """What should not be in the samples."""
    inference_steps: Annotated[int, Field(ge=1, le=150)] = 20
    """Denoising steps per sample."""
    guidance_scale: Annotated[float, Field(ge=1, le=30)] = 7.0
    """How closely a sample follows its prompt."""
    sampler: Literal[
        "auto", "DPM++ 2M", "DPM++ 2M Karras", "Euler", "Euler a", "Heun", "DDIM", "UniPC"
    ] = "auto"
    """How the noise is taken away, by the name other programs give it. auto: DPM++ 2M, and Euler for Stable Diffusion 3, which knows only Euler and Heun. Heun cannot begin at the pure noise of a base with zero terminal SNR."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 1
    """Seed of the first sample; the second takes the next one, and so on. It stays the same through the run, so that only the adapter changes."""
    vae_tiling: bool = False
    """Turn the finished latents into a picture tile by tile: far less memory at 1024 pixels, with faint differences between the tiles. The training is not touched."""

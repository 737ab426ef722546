"""The contract of a model family.

`ModelFamily` contains everything that differs between families. Code outside this folder calls
these methods and never checks which family it has. To add a family, subclass `LatentDiffusion`
(`latent_diffusion.py`) in a new file and add a row to `FAMILIES` (`registry.py`).

In shapes, B is the batch size, D a width, C the number of latent channels, and h and w are the
height and width of the latents.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from trainer.families.objective import Noised, Objective
from trainer.models.model_files import BaseFiles

Conditioning = dict[str, Tensor]
"""What a caption becomes for the denoiser: name -> tensor, batch first.

Every family has {"prompt_embeds": [B, tokens, D]}; some add {"pooled_prompt_embeds": [B, D]}.
"""

SizeIds = tuple[int, int, int, int, int, int]
"""Original height and width of the image, top and left of its crop after resizing, height and
width of the crop, all in pixels. This is SDXL's order (Podell et al. 2023, arXiv:2307.01952,
section 2.2)."""


@dataclass(frozen=True)
class Reading:
    """How captions and prompts are encoded, in training and in samples alike."""

    clip_skip: int = 1
    """The layer of the text encoder to use, counted from the end: 1 is the last."""
    chunks: int = 1
    """Number of pieces of 75 tokens. Each is encoded separately between a start and an end token,
    and the results are concatenated, as in A1111."""
    words: tuple[tuple[str, int], ...] = ()
    """(word, number of vectors) of each textual inversion (`trainer/lora/textual_inversion.py`)."""

    def with_placeholders(self, prompts: Sequence[str]) -> list[str]:
        """Returns the prompts with every textual inversion replaced by its placeholder tokens.

        Words are matched whole and in any case. Only CLIP tokenizers have the placeholders.
        """
        if not self.words:
            return list(prompts)
        tokens = {
            word.lower(): " ".join(placeholders(word, vectors)) for word, vectors in self.words
        }
        longest_first = sorted(tokens, key=len, reverse=True)
        words = "|".join(map(re.escape, longest_first))
        pattern = re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE)
        return [
            pattern.sub(lambda match: tokens.get(match[0].lower(), match[0]), prompt)
            for prompt in prompts
        ]


def placeholders(word: str, vectors: int) -> list[str]:
    """Returns the tokens that represent the vectors of a textual inversion, one per vector."""
    return [f"<|{word}:{vectors}:{index}|>" for index in range(vectors)]


PLAIN_READING = Reading()


@dataclass(frozen=True)
class Batch:
    """The inputs of one forward pass, without the noise."""

    latents: Tensor
    """[B, C, h, w], float32, shifted and scaled as the denoiser expects."""
    conditioning: Conditioning
    size_ids: Tensor
    """The SizeIds of each image, [B, 6], float32."""


def denoiser_of(pipe: Any) -> nn.Module:
    """Returns the UNet or transformer of a pipeline of any family."""
    denoiser: nn.Module = pipe.components.get("transformer") or pipe.components["unet"]
    return denoiser


def size_multiple(pipe: Any) -> int:
    """Returns the number of pixels that the width and height of an image must be multiples of.

    It is the pixels per latent, times the latents per patch if the denoiser uses patches.
    """
    patch_size: int = getattr(denoiser_of(pipe).config, "patch_size", 1)
    return int(pipe.vae_scale_factor) * patch_size


class ModelFamily(Protocol):
    """What the trainer needs to know about a family of base models.

    A family has no state: methods receive the pipeline, `pipe`, or its parts. A *component* is a
    model's name in the pipeline, such as "unet" or "text_encoder_2". A *module* is the path of a
    layer inside a component, such as "mid_block.attentions.0.proj_in".
    """

    # Recognising and loading a base model

    name: str
    """Shown to the user: "Stable Diffusion XL"."""
    pipeline_class: Any
    """The diffusers pipeline that loads and samples this family."""

    @property
    def pipeline_options(self) -> Mapping[str, Any]:
        """Arguments for `from_pretrained` that keep unused components from being loaded."""
        ...

    denoiser_name: str
    """Component of the denoiser: "unet" or "transformer"."""

    def matches_base(self, files: BaseFiles) -> bool:
        """Returns whether checked model files belong to this family.

        At most one family may match a base.
        """
        ...

    def denoiser(self, pipe: Any) -> nn.Module:
        """Returns the network that predicts the noise."""
        ...

    def text_encoders(self, pipe: Any) -> dict[str, nn.Module]:
        """Returns all loaded text encoders by component, in the order of the pipeline."""
        ...

    def trainable_text_encoders(self, pipe: Any) -> dict[str, nn.Module]:
        """Returns the text encoders that get an adapter if the settings train text encoders."""
        ...

    # Captions

    text_width: int
    """Text embedding width of the published models' cross-attention, or 0 if they have none."""
    supports_clip_skip: bool
    """Whether `Reading.clip_skip` may be set; False if the family always uses one layer."""
    supports_long_captions: bool
    """Whether `Reading.chunks` may be larger than 1."""

    def encode_prompts(
        self, pipe: Any, prompts: Sequence[str], reading: Reading = PLAIN_READING
    ) -> Conditioning:
        """Encodes B prompts, with gradients unless the caller disables them.

        Every prompt is cut or padded to the same number of tokens. The tensors have the dtype and
        device of the text encoders.
        """
        ...

    def token_counts(self, pipe: Any, prompts: Sequence[str]) -> tuple[list[int], int]:
        """Returns the tokens of each prompt, and how many of them are encoded without chunks.

        Start and end tokens are not counted.
        """
        ...

    # Denoising

    def objective(self, pipe: Any) -> Objective:
        """Returns what the denoiser learns, with the noise schedule of the pipeline."""
        ...

    def predict(self, denoiser: nn.Module, noised: Noised, batch: Batch) -> Tensor:
        """Returns the denoiser's output, [B, C, h, w], which is compared with `noised.target`.

        The inputs are converted to the dtype of the frozen weights.
        """
        ...

    # Adapter files

    @property
    def metadata_prefixes(self) -> tuple[str, ...]:
        """Lists how `modelspec.architecture` and `ss_base_model_version` start in its files."""
        ...

    def matches_adapter_keys(self, paths: Collection[str]) -> bool:
        """Returns whether an adapter file without metadata belongs to this family.

        `paths` are the adapted layers as "component.module", such as "unet.mid_block...to_q".
        `text_width` is compared before this method is called.
        """
        ...

    @property
    def default_format(self) -> Literal["kohya", "diffusers"]:
        """The file format that most programs read for this family."""
        ...

    def kohya_key(self, component: str, module: str) -> str:
        """Returns the name of a module in a kohya file, without the ending.

        ("unet", "mid_block...to_q") becomes "lora_unet_mid_block_..._to_q".
        """
        ...

    def fused_projection(self, module: str) -> tuple[str, int | None]:
        """Returns the path of a denoiser module in a kohya file, and its index in a fused layer.

        If the kohya format stores query, key and value as one layer, the path is the fused layer's
        and the index is 0, 1 or 2. Otherwise the index is None.
        """
        ...

    @property
    def open_clip_encoders(self) -> Sequence[str]:
        """Components of the text encoders that other programs load as OpenCLIP.

        Their query, key, value and output projections form one layer there, so a file must contain
        all four of them or none.
        """
        ...

    @property
    def embedding_keys(self) -> Mapping[str, str]:
        """Component of each CLIP encoder -> its tensor in a textual inversion file.

        The names are those that A1111 and ComfyUI read.
        """
        ...

    def metadata(self, prediction_type: str) -> dict[str, Any]:
        """Returns the metadata that identifies the family in an adapter file.

        The keys are `ss_base_model_version` and `ss_v2`, which A1111 reads, and
        `modelspec.architecture`.
        """
        ...

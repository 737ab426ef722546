"""What the trainer asks of a model family. Nothing outside this folder knows which family it has."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from trainer.families.objective import Noised, Objective
from trainer.models.model_files import BaseFiles

Conditioning = dict[str, Tensor]
"""What the denoiser is told about the pictures, by name, each with the batch first: {"prompt_embeds": [B, 77, D]}."""

SizeIds = tuple[int, int, int, int, int, int]
"""Height and width of the picture as it came, top and left of its crop after resizing, height and width of the crop: SDXL's order
(Podell et al. 2023, arXiv:2307.01952, section 2.2), in pixels."""


@dataclass(frozen=True)
class Reading:
    """How captions and prompts are read, in training and in samples alike."""

    clip_skip: int = 1
    """Which layer of the text encoder, from the end: 1 is the last."""
    chunks: int = 1
    """Pieces of 75 tokens, each encoded by itself between a start and an end mark, then set side by side as A1111 does."""
    words: tuple[tuple[str, int], ...] = ()
    """Words that the CLIP encoders have learned anew, with the number of their vectors (`trainer/textual_inversion.py`)."""

    def spelled(self, prompts: Sequence[str]) -> list[str]:
        """The prompts as the tokenizers of CLIP are to read them, with placeholders for the learned words."""
        if not self.words:
            return list(prompts)
        tokens = {
            word.lower(): " ".join(placeholders(word, vectors)) for word, vectors in self.words
        }
        known = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
        pattern = re.compile(rf"(?<!\w)(?:{known})(?!\w)", re.IGNORECASE)
        return [
            pattern.sub(lambda found: tokens.get(found[0].lower(), found[0]), prompt)
            for prompt in prompts
        ]


def placeholders(word: str, vectors: int) -> list[str]:
    """Tokens that stand for the vectors of a learned word."""
    return [f"<|{word}:{vectors}:{index}|>" for index in range(vectors)]


PLAIN_READING = Reading()


@dataclass(frozen=True)
class Batch:
    """One forward pass."""

    latents: Tensor
    """[B, C, h, w], float32, scaled as the denoiser wants them."""
    conditioning: Conditioning
    size_ids: Tensor
    """The SizeIds of each picture, [B, 6], float32."""


def denoiser_of(pipe: Any) -> nn.Module:
    """The UNet or transformer of a pipeline of any family."""
    return pipe.components.get("transformer") or pipe.components["unet"]


def pixel_step(pipe: Any) -> int:
    """Sides of a picture are multiples of this: pixels per latent, times latents per patch where the denoiser cuts them into patches."""
    return pipe.vae_scale_factor * getattr(denoiser_of(pipe).config, "patch_size", 1)


class ModelFamily(Protocol):
    """Stateless: everything it needs is handed over."""

    name: str
    pipeline_class: Any
    """The diffusers pipeline that loads and samples this family."""

    @property
    def pipeline_options(self) -> Mapping[str, Any]:
        """What its `from_pretrained` is told, so that parts which no training needs are not loaded."""
        ...

    denoiser_name: str
    """Of its component in the pipeline: "unet" or "transformer"."""

    @property
    def metadata_prefixes(self) -> tuple[str, ...]:
        """How the family's name begins in the metadata of adapter files."""
        ...

    @property
    def open_clip(self) -> Sequence[str]:
        """The text encoders that other programs have in OpenCLIP's form, with q, k, v and out in one."""
        ...

    @property
    def embedding_keys(self) -> Mapping[str, str]:
        """What A1111 and ComfyUI call the vectors of each CLIP encoder in the file of an embedding."""
        ...

    text_width: int
    """Numbers by token that the denoiser's cross attention reads, in the published models; 0 where there is none."""
    skips_layers: bool
    """Whether `Reading.clip_skip` means something; where the family fixes the layer it does not."""
    reads_in_chunks: bool

    def matches_base(self, files: BaseFiles) -> bool:
        """Whether checked model files hold this family."""
        ...

    def matches_adapter_keys(self, paths: Collection[str]) -> bool:
        """Whether an adapter that says nothing of itself is of this family: told by what it changes, such as "unet.mid_block...to_q"."""
        ...

    def denoiser(self, pipe: Any) -> nn.Module: ...

    def text_encoders(self, pipe: Any) -> dict[str, nn.Module]:
        """The text encoders by the name of their component: {"text_encoder": ...}."""
        ...

    def trainable_text_encoders(self, pipe: Any) -> dict[str, nn.Module]:
        """Those of them that get an adapter where one is asked for."""
        ...

    def objective(self, pipe: Any) -> Objective: ...

    def encode_prompts(
        self, pipe: Any, prompts: Sequence[str], reading: Reading = PLAIN_READING
    ) -> Conditioning:
        """With gradients where a text encoder is trained. Prompts longer than is read are cut; all come out equally long."""
        ...

    def token_counts(self, pipe: Any, prompts: Sequence[str]) -> tuple[list[int], int]:
        """Tokens of each prompt without its start and end marks, and how many the encoder reads."""
        ...

    def predict(self, denoiser: nn.Module, noised: Noised, batch: Batch) -> Tensor:
        """The denoiser's output, in the shape of the target."""
        ...

    @property
    def dialect(self) -> Literal["kohya", "diffusers"]:
        """What its files are written in: what most programs read."""
        ...

    def export_key(self, component: str, module: str) -> str:
        """Where a module stands in a kohya file: ("unet", "mid_block...to_q") -> "lora_unet_mid_block_..._to_q"."""
        ...

    def fused(self, module: str) -> tuple[str, int | None]:
        """A layer of the denoiser as kohya files have it: where these have q, k and v in one, the path of that and which third it is."""
        ...

    def metadata(self, prediction_type: str) -> dict[str, Any]:
        """What a file says of its family: `ss_base_model_version` and `ss_v2`, by which A1111 sorts it, and `modelspec.architecture`."""
        ...

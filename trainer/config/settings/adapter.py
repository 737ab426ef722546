"""The section [adapter]."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from trainer.config import parsers
from trainer.config.settings.section import Section


class Adapter(Section):
    """What is trained beside the frozen base: W' = W + (alpha / rank) B A, or one of its relatives."""

    kind: Literal["lora", "rslora", "dora", "loha", "lokr"] = "lora"
    """lora: read everywhere. rslora: scale alpha / sqrt(rank), for high ranks. dora: direction and length of the weights apart, slower. loha, lokr: products with more rank for their size, in LyCORIS's names."""
    start_from: str = ""
    """An adapter file of any program to go on from, of the same kind and kind of base. Its rank and alpha are taken over. Empty: a fresh adapter."""
    targets: Literal["attention", "attention+feed-forward", "linear", "linear+conv"] = "attention"
    """Which layers of the UNet learn. linear: also the projections around the attention; linear+conv: also the convolutions (LoCon), good for styles. More layers learn more and give a larger file."""
    target_pattern: Annotated[str, Field(max_length=200), AfterValidator(parsers.pattern)] = ""
    """Instead of the targets: a regular expression, searched in the path of every layer of the UNet, such as up_blocks.*attn2. Empty: the targets."""
    text_encoder_targets: Literal["attention", "all"] = "attention"
    """Which layers of a trained text encoder learn: its attention, or its feed-forward layers too."""
    rank: Annotated[int, Field(ge=1, le=512)] = 16
    """Capacity of the adapter. 8 to 16 suits a subject, 16 to 64 a style with many details; the file grows with it."""
    alpha: Annotated[float, Field(gt=0, le=4096)] = 16.0
    """Strength of the adapter relative to its rank (scale = alpha / rank). Changing it acts like changing the learning rate."""
    conv_rank: Annotated[int, Field(ge=0, le=512)] = 0
    """Rank of the adapters of convolutions larger than 1 x 1. 0: the rank of the others."""
    conv_alpha: Annotated[float, Field(ge=0, le=4096)] = 0.0
    """Alpha of the adapters of those convolutions. 0: in proportion to their rank."""
    ranks: Annotated[str, Field(max_length=2000), AfterValidator(parsers.ranks)] = ""
    """Ranks of single blocks or layers by name, the last one that fits counts: mid_block=32, attn2=8, down_blocks.0=0. With 0 a block learns nothing. The alpha keeps its proportion."""
    alphas: Annotated[str, Field(max_length=2000), AfterValidator(parsers.alphas)] = ""
    """Alphas of single blocks or layers, written in the same way."""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = "default"
    """How the adapter starts. pissa: along the strongest directions of each weight (Meng et al. 2024, arXiv:2404.02948), which learns faster; olora: along its QR factors (arXiv:2406.01775). The file of these two has twice the rank."""
    lokr_factor: Annotated[int, Field(ge=0, le=512)] = 0
    """Size of the smaller of the two matrices of lokr: 4 to 16 for a large adapter, 0 for the smallest."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs left out at random in each step. 0.1 slows memorising of small datasets."""
    rank_dropout: Annotated[float, Field(ge=0, le=0.8)] = 0.0
    """Share of the ranks (of the outputs, for loha and lokr) left out at random in each step."""
    module_dropout: Annotated[float, Field(ge=0, le=0.8)] = 0.0
    """Share of the adapted layers that act as in the base in each step."""
    max_norm: Annotated[float, Field(ge=0)] = 0.0
    """After each step the change of any layer that is larger than this (the norm of delta W) is shrunk to it, so that no layer takes over. 1 is usual; 0 switches it off."""
    trigger_vectors: Annotated[int, Field(ge=0, le=32)] = 0
    """Teach the CLIP text encoders the trigger as a new word of this many vectors, beside the adapter (pivotal tuning: Gal et al. 2022, arXiv:2208.01618, with an adapter). They are saved next to it, as an embedding for A1111 and ComfyUI. 1 to 4 suit a subject; each is a token of the caption. 0 switches it off."""
    trigger_init: Annotated[str, Field(max_length=200)] = ""
    """What the new word means at first, in words that the base knows, such as dog. Empty: whatever the base makes of the trigger word."""

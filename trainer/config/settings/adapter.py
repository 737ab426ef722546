"""The section [adapter] of the settings."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from trainer.config import parsers
from trainer.config.settings.section import Section


class Adapter(Section):
    """What is trained beside the frozen base model.

    For a LoRA, W' = W + (alpha / rank) B A.
    """

    kind: Literal["lora", "rslora", "dora", "loha", "lokr"] = Field(
        default="lora", title="LoRA type"
    )
    """lora: every program reads it. rslora: scaled by alpha / sqrt(rank), for high ranks. dora:
    trains magnitude and direction of the weights separately, slower. loha and lokr: higher rank
    for the same file size, in the file format of LyCORIS."""

    start_from: str = Field(default="", title="Continue from LoRA file")
    """An adapter file of any program to continue from. It must have the same LoRA type and the
    same kind of base model; its rank and alpha are used. Empty: a new adapter."""

    targets: Literal["attention", "attention+feed-forward", "linear", "linear+conv"] = Field(
        default="attention", title="Trained layers"
    )
    """Which layers of the UNet are trained. linear: also the projections around the attention.
    linear+conv: also the convolutions (LoCon), good for styles. More layers learn more and give a
    larger file."""

    target_pattern: Annotated[str, AfterValidator(parsers.checked_pattern)] = Field(
        default="", title="Layer filter (regex)", max_length=200
    )
    """Replaces the choice of trained layers by a regular expression. A layer of the UNet is
    trained if the expression matches anywhere in its path, such as up_blocks.*attn2. Empty: the
    trained layers above."""

    text_encoder_targets: Literal["attention", "all"] = Field(
        default="attention", title="Text encoder layers"
    )
    """Which layers of a trained text encoder are trained. all: its feed-forward layers too."""

    rank: int = Field(default=16, title="Network rank (dimension)", ge=1, le=512)
    """Capacity of the adapter. 8 to 16 suits a subject, 16 to 64 a style with many details. The
    file size is proportional to it."""

    alpha: float = Field(default=16.0, title="Network alpha", gt=0, le=4096)
    """Scales the adapter by alpha / rank. A change has the same effect as a change of the
    learning rate."""

    conv_rank: int = Field(default=0, title="Convolution rank (dimension)", ge=0, le=512)
    """Rank of the convolutions larger than 1 x 1. 0: the network rank."""

    conv_alpha: float = Field(default=0.0, title="Convolution alpha", ge=0, le=4096)
    """Alpha of the convolutions larger than 1 x 1. 0: in proportion to their rank."""

    ranks: Annotated[str, AfterValidator(parsers.checked_ranks)] = Field(
        default="", title="Rank per block", max_length=2000
    )
    """Ranks of single blocks or layers by name, such as mid_block=32, attn2=8, down_blocks.0=0.
    If several names match a layer, the last one counts. A block with rank 0 is not trained. Alpha
    stays in proportion."""

    alphas: Annotated[str, AfterValidator(parsers.checked_alphas)] = Field(
        default="", title="Alpha per block", max_length=2000
    )
    """Alphas of single blocks or layers, in the same form as the ranks."""

    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = Field(
        default="default", title="Weight initialisation"
    )
    """Start weights of the adapter. pissa: the principal components of each weight (Meng et al.
    2024, arXiv:2404.02948), which learn faster. olora: its QR factors (arXiv:2406.01775). The
    finished file of these two has twice the rank."""

    lokr_factor: int = Field(default=0, title="LoKr factor", ge=0, le=512)
    """Size of the smaller of the two matrices of lokr. 4 to 16 give a large adapter, 0 the
    smallest one."""

    dropout: float = Field(default=0.0, title="Dropout", ge=0, lt=1)
    """Fraction of the adapter's inputs dropped at random in each step. 0.1 reduces memorising of
    small datasets."""

    rank_dropout: float = Field(default=0.0, title="Rank dropout", ge=0, le=0.8)
    """Fraction of the ranks (of the outputs, for loha and lokr) dropped at random in each
    step."""

    module_dropout: float = Field(default=0.0, title="Module dropout", ge=0, le=0.8)
    """Fraction of the layers that run without their adapter in each step, chosen at random."""

    max_norm: float = Field(default=0.0, title="Scale weight norms", ge=0)
    """Maximum norm of the change of a layer (delta W). Larger changes are scaled down to it after
    each step, so that no layer dominates. 1 is usual; 0 switches it off."""

    trigger_vectors: int = Field(default=0, title="Embedding vectors per trigger word", ge=0, le=32)
    """Also trains the trigger word as a new token of the CLIP text encoders, with this many
    vectors (pivotal tuning: textual inversion, Gal et al. 2022, arXiv:2208.01618, together with
    an adapter). They are saved beside the adapter as an embedding for A1111 and ComfyUI. 1 to 4
    suit a subject; each vector uses one token of the caption. 0 switches it off."""

    trigger_init: str = Field(default="", title="Initial embedding text", max_length=200)
    """Start of the new token, in words that the base model knows, such as dog. Empty: the
    embedding of the trigger word in the base model."""

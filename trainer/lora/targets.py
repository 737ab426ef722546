"""Which projections of a model get an adapter, of what rank and strength: by names and shapes alone, so that the page can count them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import regex

from trainer.config import Adapter, numbers_by_name
from trainer.errors import ConfigError
from trainer.models.safetensors_header import TensorInfo

# Ends of the paths of the projections, in diffusers' and transformers' names.
# Those of the text's stream in Stable Diffusion 3 beside those of the picture's.
ATTENTION = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
)
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
PROJECTIONS = ("proj_in", "proj_out", "time_emb_proj", "context_embedder")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
DENOISER = {
    "attention": ATTENTION,
    "attention+feed-forward": ATTENTION + FEED_FORWARD,
    "linear": ATTENTION + FEED_FORWARD + PROJECTIONS,
    "linear+conv": ATTENTION + FEED_FORWARD + PROJECTIONS + CONVOLUTIONS,
}
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
TEXT_ENCODER = {"attention": TEXT_ATTENTION, "all": (*TEXT_ATTENTION, "mlp.fc1", "mlp.fc2")}

NO_PROJECTION = (
    "token_embedding",
    "position_embedding",
    "text_projection",
)  # tables, and a layer that loaders refuse an adapter for
PATTERN_SECONDS = 0.2  # for one name; a pattern can come from a stranger, and some take years


@dataclass(frozen=True)
class Target:
    """One projection that gets an adapter."""

    name: str
    """Its path inside the component."""
    shape: tuple[int, ...]
    """Of its weight: [outputs, inputs], or [outputs, inputs, height, width] for a convolution."""
    rank: int
    alpha: float


def projections(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the weight, of every projection that a file of weights holds."""
    named = (
        (name.removesuffix(".weight"), info.shape)
        for name, info in tensors.items()
        if name.endswith(".weight")
    )
    return {
        name: shape
        for name, shape in named
        if len(shape) in (2, 4) and not name.endswith(NO_PROJECTION)
    }


def choose_targets(
    adapter: Adapter, component: str, shapes: Mapping[str, tuple[int, ...]]
) -> list[Target]:
    """The projections of a component that get an adapter. Raises ConfigError where a setting fits none."""
    return [
        Target(name, shape, rank, alpha)
        for name, shape in shapes.items()
        if _wanted(adapter, component, name)
        for rank, alpha in _strength(adapter, f"{component}.{_plain(name)}", shape)
        if rank
    ] or _nothing(adapter, component)


def _plain(name: str) -> str:
    """Without the level that some versions of transformers have and others have not."""
    return name.removeprefix("text_model.")


def _wanted(adapter: Adapter, component: str, name: str) -> bool:
    if name.endswith(NO_PROJECTION):
        return False
    if component.startswith("text_encoder"):
        return _ends(name, TEXT_ENCODER[adapter.text_encoder_targets])
    if not adapter.target_pattern:
        return _ends(name, DENOISER[adapter.targets])
    try:
        return regex.search(adapter.target_pattern, name, timeout=PATTERN_SECONDS) is not None
    except TimeoutError:
        raise ConfigError(
            f"adapter.target_pattern ({adapter.target_pattern}) takes too long to compare with the name {name}; write it more simply."
        ) from None


def _ends(name: str, ends: tuple[str, ...]) -> bool:
    return f".{name}".endswith(tuple(f".{end}" for end in ends))


def _strength(adapter: Adapter, path: str, shape: tuple[int, ...]) -> Iterator[tuple[int, float]]:
    """Rank and alpha of one projection: those of all, those of convolutions, then what is said by name; the last word counts."""
    rank, alpha = adapter.rank, 0.0
    if len(shape) == 4 and shape[2:] != (1, 1):
        rank, alpha = adapter.conv_rank or rank, adapter.conv_alpha
    for name, value in numbers_by_name(adapter.ranks).items():
        if _inside(name, path):
            rank = int(value)
    for name, value in numbers_by_name(adapter.alphas).items():
        if _inside(name, path):
            alpha = value
    yield rank, alpha or adapter.alpha * rank / adapter.rank


def _inside(name: str, path: str) -> bool:
    """Whether a name is a whole part of a path: "attn2" of "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"."""
    return f".{name}." in f".{path}."


def check_names(adapter: Adapter, paths: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
    """Raises ConfigError for a name in adapter.ranks or adapter.alphas that no projection of any component has."""
    everything = [
        f"{component}.{_plain(name)}" for component, shapes in paths.items() for name in shapes
    ]
    for setting in ("ranks", "alphas"):
        for name in numbers_by_name(getattr(adapter, setting)):
            if not any(_inside(name, path) for path in everything):
                raise ConfigError(
                    f"adapter.{setting} names {name}, which is no part of the path of any module that is trained. "
                    f"A path looks like {everything[len(everything) // 2]}."
                )


def _nothing(adapter: Adapter, component: str) -> list[Target]:
    if adapter.target_pattern and not component.startswith("text_encoder"):
        raise ConfigError(
            f"adapter.target_pattern ({adapter.target_pattern}) fits no module of the {component}. "
            "It is searched in paths such as mid_block.attentions.0.transformer_blocks.0.attn1.to_q."
        )
    raise ConfigError(
        f"No module of the {component} is left to train: adapter.ranks sets all of them to 0, or the base has other names."
    )


def factorization(size: int, factor: int) -> tuple[int, int]:
    """Two whole numbers with this product, as PEFT's LoKr cuts a side of a weight: `factor` first where it divides the size, else the
    largest divisor that is not above it nor above the square root. Factor 0 sets no limit."""
    if factor and size % factor == 0:
        return factor, size // factor
    smaller = next(n for n in range(min(factor or size, math.isqrt(size)), 0, -1) if size % n == 0)
    return smaller, size // smaller


def adapter_parameters(adapter: Adapter, target: Target) -> int:
    """Trained numbers of one adapted projection."""
    outputs, inputs = target.shape[:2]
    kernel = target.shape[2] * target.shape[3] if len(target.shape) == 4 else 1
    if adapter.kind == "loha":
        return 2 * target.rank * (outputs + inputs * kernel)
    if adapter.kind == "lokr":
        (out_small, out_large), (in_small, in_large) = (
            factorization(side, adapter.lokr_factor) for side in (outputs, inputs)
        )
        whole = target.rank >= max(out_large, in_large) / 2
        second = (
            out_large * in_large * kernel
            if whole
            else target.rank * (out_large + in_large * kernel)
        )
        return out_small * in_small + second
    return target.rank * (outputs + inputs * kernel) + (outputs if adapter.kind == "dora" else 0)

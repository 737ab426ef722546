"""Which layers of a model get an adapter, and of which rank and alpha.

Works on names and shapes only, without torch, so that the page can count parameters.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import regex

from trainer.config import Adapter, numbers_by_name
from trainer.errors import ConfigError
from trainer.models.safetensors_header import TensorInfo

# Ends of module paths, in the names of diffusers and transformers. Stable Diffusion 3 has
# projections for the text stream (add_q_proj, ff_context, ...) beside those for the image stream.
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
"""Layers of the denoiser by the value of adapter.targets."""
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
TEXT_ENCODER = {"attention": TEXT_ATTENTION, "all": (*TEXT_ATTENTION, "mlp.fc1", "mlp.fc2")}
"""Layers of a text encoder by the value of adapter.text_encoder_targets."""

NEVER_ADAPTED = ("token_embedding", "position_embedding", "text_projection")
"""Embedding tables, and a layer for which loaders refuse an adapter."""
PATTERN_SECONDS = 0.2
"""Time limit for matching one name. The pattern may be hostile, and some patterns take years."""


@dataclass(frozen=True)
class Target:
    """A layer that gets an adapter."""

    name: str
    """Its path inside the component."""
    shape: tuple[int, ...]
    """Of its weight: [outputs, inputs], or [outputs, inputs, height, width] for a convolution."""
    rank: int
    alpha: float


def projections(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """Returns the weight shape of every linear layer and convolution in a weight file, by path."""
    shapes = {}
    for name, info in tensors.items():
        path = name.removesuffix(".weight")
        is_weight = path != name and len(info.shape) in (2, 4)
        if is_weight and not path.endswith(NEVER_ADAPTED):
            shapes[path] = info.shape
    return shapes


def choose_targets(
    adapter: Adapter, component: str, shapes: Mapping[str, tuple[int, ...]]
) -> list[Target]:
    """Returns the layers of a component that get an adapter.

    Raises ConfigError if the settings select none.
    """
    targets = []
    for name, shape in shapes.items():
        if not _is_selected(adapter, component, name):
            continue
        rank, alpha = _rank_and_alpha(adapter, f"{component}.{_without_text_model(name)}", shape)
        if rank:
            targets.append(Target(name, shape, rank, alpha))
    if targets:
        return targets
    if adapter.target_pattern and not component.startswith("text_encoder"):
        raise ConfigError(
            f"adapter.target_pattern ({adapter.target_pattern}) matches no module of the "
            f"{component}. It is searched in paths such as "
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_q."
        )
    raise ConfigError(
        f"No module of the {component} is left to train: adapter.ranks sets the rank of every "
        "module to 0, or the base has other names."
    )


def _without_text_model(name: str) -> str:
    """Removes a level that text encoders lack in some versions of transformers."""
    return name.removeprefix("text_model.")


def _is_selected(adapter: Adapter, component: str, name: str) -> bool:
    if name.endswith(NEVER_ADAPTED):
        return False
    if component.startswith("text_encoder"):
        return _has_end(name, TEXT_ENCODER[adapter.text_encoder_targets])
    if not adapter.target_pattern:
        return _has_end(name, DENOISER[adapter.targets])
    try:
        return regex.search(adapter.target_pattern, name, timeout=PATTERN_SECONDS) is not None
    except TimeoutError:
        raise ConfigError(
            f"adapter.target_pattern ({adapter.target_pattern}) takes too long to match the name "
            f"{name}. Simplify it."
        ) from None


def _has_end(name: str, ends: tuple[str, ...]) -> bool:
    """Whether a path ends with one of these, as whole words."""
    return f".{name}".endswith(tuple(f".{end}" for end in ends))


def _rank_and_alpha(adapter: Adapter, path: str, shape: tuple[int, ...]) -> tuple[int, float]:
    """Returns rank and alpha of one layer. adapter.ranks and alphas override the other settings.

    If several of their names match, the last one counts.
    """
    rank, alpha = adapter.rank, 0.0
    if len(shape) == 4 and shape[2:] != (1, 1):
        rank, alpha = adapter.conv_rank or rank, adapter.conv_alpha
    for name, value in numbers_by_name(adapter.ranks).items():
        if _contains(path, name):
            rank = int(value)
    for name, value in numbers_by_name(adapter.alphas).items():
        if _contains(path, name):
            alpha = value
    # Without an alpha for this layer, the scale alpha / rank is the same as elsewhere.
    return rank, alpha or adapter.alpha * rank / adapter.rank


def _contains(path: str, name: str) -> bool:
    """Whether a path contains a name as whole words: "unet.mid_block.attn2.to_q" has "attn2"."""
    return f".{name}." in f".{path}."


def check_names(adapter: Adapter, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
    """Raises ConfigError if a name in adapter.ranks or adapter.alphas matches no module.

    `shapes` are the weight shapes by component and path.
    """
    paths = []
    for component, names in shapes.items():
        paths += [f"{component}.{_without_text_model(name)}" for name in names]
    for setting in ("ranks", "alphas"):
        for name in numbers_by_name(getattr(adapter, setting)):
            if not any(_contains(path, name) for path in paths):
                raise ConfigError(
                    f"adapter.{setting} contains {name}, which is not part of the path of any "
                    f"trained module. An example of a path is {paths[len(paths) // 2]}."
                )


def factorization(size: int, factor: int) -> tuple[int, int]:
    """Returns the two factors into which PEFT's LoKr splits a side of a weight.

    The first is `factor` if it divides the size. Otherwise it is the largest divisor that is
    neither above `factor` nor above the square root. Factor 0 sets no limit.
    """
    if factor and size % factor == 0:
        return factor, size // factor
    smaller = min(factor or size, math.isqrt(size))
    while size % smaller:
        smaller -= 1
    return smaller, size // smaller


def adapter_parameters(adapter: Adapter, target: Target) -> int:
    """Returns the number of trained parameters of one layer's adapter."""
    outputs, inputs = target.shape[:2]
    kernel = math.prod(target.shape[2:])
    if adapter.kind == "lokr":
        return _lokr_parameters(adapter, target.rank, outputs, inputs, kernel)
    low_rank = target.rank * (outputs + inputs * kernel)
    if adapter.kind == "loha":
        return 2 * low_rank
    return low_rank + (outputs if adapter.kind == "dora" else 0)


def _lokr_parameters(adapter: Adapter, rank: int, outputs: int, inputs: int, kernel: int) -> int:
    """The first factor is a full matrix. So is the second if its rank would not be low."""
    small_outputs, large_outputs = factorization(outputs, adapter.lokr_factor)
    small_inputs, large_inputs = factorization(inputs, adapter.lokr_factor)
    first = small_outputs * small_inputs
    if rank >= max(large_outputs, large_inputs) / 2:
        return first + large_outputs * large_inputs * kernel
    return first + rank * (large_outputs + large_inputs * kernel)

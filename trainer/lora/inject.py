"""The adapter inside the model: creates it, finds it and counts it. W' = W + delta W, W frozen.

LoRA: delta W = scale B A (Hu et al. 2021, arXiv:2106.09685), on convolutions too (LoCon, Yeh et
    al. 2023, arXiv:2309.14859, section 3).
rsLoRA scales by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732).
DoRA trains the norms of the rows separately (Liu et al. 2024, arXiv:2402.09353).
LoHa and LoKr are Hadamard and Kronecker products (Yeh et al. 2023, sections 3.2 and 3.3).
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from trainer import config
from trainer.errors import ConfigError
from trainer.lora.formats.adapted_module import DOWN, UP, AdaptedModule, decompose, kind_of
from trainer.lora.fused_linear import register_fused_linear
from trainer.lora.initialization import initialize
from trainer.lora.targets import Target, choose_targets
from trainer.models.seeds import seed_for

ADAPTER = "atelier"
"""Name of the adapter inside PEFT's layers."""


def weight_shapes(component: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the weight shape of every linear layer and convolution, by path.

    For a quantised layer it is the shape of the original weight: the stored one differs.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in component.named_modules():
        if isinstance(layer, nn.Linear):
            shapes[name] = (layer.out_features, layer.in_features)
        elif isinstance(layer, nn.Conv2d):
            shapes[name] = tuple(layer.weight.shape)
    return shapes


def targets_of(component: nn.Module, name: str, adapter: config.Adapter) -> list[Target]:
    """Returns the layers of a component that get an adapter. `name` is its name in the pipeline.

    Raises ConfigError if the settings select no layer, or something that PEFT does not support.
    """
    targets = choose_targets(adapter, name, weight_shapes(component))
    has_convolutions = any(len(target.shape) == 4 for target in targets)
    is_half = any(p.dtype in (torch.float16, torch.bfloat16) for p in component.parameters())
    if adapter.kind == "dora" and adapter.dropout and has_convolutions and is_half:
        # PEFT then multiplies float32 inputs with half-precision weights (tested with 0.21.2).
        raise ConfigError(
            f"adapter.dropout does not work with dora on the convolutions of the {name} in half "
            "precision. Set it to 0, adapter.targets = attention, or base.precision = fp32."
        )
    return targets


def inject(component: nn.Module, name: str, adapter: config.Adapter, seed: int) -> None:
    """Adds a new adapter to the target layers of a component.

    The adapter's weights are float32. They are the only parameters with gradients. Raises
    ConfigError like `targets_of`.
    """
    targets = targets_of(component, name, adapter)
    # PEFT draws A from the global generator. In half precision it would also keep the adapter in
    # half precision, which loses an update of a ten-thousandth.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "adapter", type(component).__name__))
        component.add_adapter(_peft_config(adapter, targets), adapter_name=ADAPTER)
        cast_training_params(component, torch.float32)
        for target in targets:
            layer = component.get_submodule(target.name)
            if adapter.init != "default":
                initialize(layer, ADAPTER, adapter.init)
            if isinstance(layer, LoraLayer) and (adapter.rank_dropout or adapter.module_dropout):
                layer.lora_A[ADAPTER].register_forward_hook(_dropout_hook(adapter))
    # New layers are in training mode: their dropout would change samples and validation losses.
    component.eval()


def _peft_config(adapter: config.Adapter, targets: Sequence[Target]) -> PeftConfig:
    ranks = {target.name: target.rank for target in targets}
    alphas = {target.name: target.alpha for target in targets}
    common: dict[str, Any] = {
        "r": adapter.rank,
        "target_modules": _any_of(ranks),
        "rank_pattern": _pattern(ranks, adapter.rank),
        "alpha_pattern": _pattern(alphas, adapter.alpha),
    }
    if adapter.kind in ("loha", "lokr"):
        common |= {
            "alpha": adapter.alpha,
            "rank_dropout": adapter.rank_dropout,
            "module_dropout": adapter.module_dropout,
        }
    if adapter.kind == "loha":
        return LoHaConfig(**common)
    if adapter.kind == "lokr":
        factor = adapter.lokr_factor or -1
        return LoKrConfig(rank_dropout_scale=True, decompose_factor=factor, **common)
    lora = LoraConfig(
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.kind == "rslora",
        use_dora=adapter.kind == "dora",
        **common,
    )
    has_dropout = adapter.dropout or adapter.rank_dropout or adapter.module_dropout
    if not has_dropout and adapter.kind != "dora":
        register_fused_linear(lora)
    return lora


def _any_of(names: Iterable[str]) -> str:
    """Returns a regular expression for exactly these paths. PEFT matches plain names to ends."""
    return f"^(?:{'|'.join(map(re.escape, names))})"


def _pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
    """Returns PEFT's table of exceptions: one regular expression for each other value.

    PEFT tries every expression on every module, so one expression for each module would be slow.
    """
    modules: dict[float, list[str]] = {}
    for name, value in values.items():
        if value != default:
            modules.setdefault(value, []).append(name)
    return {_any_of(names): value for value, names in modules.items()}


def _dropout_hook(adapter: config.Adapter) -> Callable[..., Tensor]:
    """Returns a forward hook on A that drops some ranks, or the whole product.

    PEFT supports this for LoHa and LoKr only. The hook draws from the global generator, which
    the training step seeds. The remaining ranks are enlarged, as in any dropout. A remaining
    module is not.
    """

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not layer.training:
            return output
        rank = layer.weight.shape[0]
        ranks = (torch.rand(rank) >= adapter.rank_dropout) / (1 - adapter.rank_dropout)
        mask = ranks * (torch.rand(()) >= adapter.module_dropout)
        # The ranks are the second axis of a convolution's output, and the last one of a matrix.
        axes_behind = output.dim() - 2 if output.dim() == 4 else 0
        return output * mask.to(output).reshape(-1, *[1] * axes_behind)

    return hook


def trainable(component: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the adapter's parameters by name, or nothing if the component has no adapter."""
    parameters = component.named_parameters()
    return {name: parameter for name, parameter in parameters if parameter.requires_grad}


def cap_norms(components: Iterable[nn.Module], limit: float) -> None:
    """Shrinks every delta W whose norm is above the limit, all factors by the same ratio.

    Max-norm regularisation (Srivastava et al. 2014, JMLR 15, section 5.1) of each layer's
    change, as in sd-scripts' scale_weight_norms.
    """
    with torch.no_grad():
        for component in components:
            for layer in component.modules():
                if not isinstance(layer, BaseTunerLayer):
                    continue
                if factors := _factors(layer, ADAPTER):
                    _cap_norm(factors, layer.scaling[ADAPTER], limit)


def _cap_norm(factors: dict[str, nn.Parameter], scale: float, limit: float) -> None:
    norm = AdaptedModule("", "", kind_of(factors), factors, scale).delta.norm()
    # No `if norm > limit`: a data-dependent branch would synchronise the GPU.
    ratio = (limit / norm).clamp(max=1) ** (1 / len(factors))
    for factor in factors.values():
        factor *= ratio


def initial_factors(component: nn.Module) -> dict[str, Tensor]:
    """Returns the buffers that an adapter with a large start subtracts, by name.

    A checkpoint contains them, because decompositions differ between machines.
    """
    ends = (".start_down", ".start_up")
    buffers = component.named_buffers()
    return {name: buffer for name, buffer in buffers if name.endswith(ends)}


@contextmanager
def adapters_disabled(components: Iterable[nn.Module]) -> Iterator[None]:
    """Makes the components compute what the base alone would compute."""
    layers: list[BaseTunerLayer] = []
    for component in components:
        layers += [layer for layer in component.modules() if isinstance(layer, BaseTunerLayer)]
    # PEFT's method also removes the gradients of the adapter, and then enables those of every
    # parameter.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def adapted_modules(
    components: dict[str, nn.Module], adapter: str = ADAPTER
) -> Iterator[AdaptedModule]:
    """Yields every layer with this adapter, with its weights copied to the CPU in float32."""
    for component, model in components.items():
        for name, layer in model.named_modules():
            if not isinstance(layer, BaseTunerLayer):
                continue
            if tensors := _tensors(layer, adapter):
                kind, scale = kind_of(tensors), layer.scaling[adapter]
                yield AdaptedModule(component, name, kind, tensors, scale)


def _copy(weights: Tensor) -> Tensor:
    return weights.detach().float().cpu().clone()


def _factors(layer: BaseTunerLayer, adapter: str) -> dict[str, nn.Parameter]:
    """Returns the factors of delta W by their names in a file. They are not copies."""
    if not isinstance(layer, LoraLayer):
        parts = {name: getattr(layer, name) for name in layer.adapter_layer_names}
        return {name: part[adapter] for name, part in parts.items() if adapter in part}
    if adapter not in layer.lora_A:
        return {}
    return {DOWN: layer.lora_A[adapter].weight, UP: layer.lora_B[adapter].weight}


def _tensors(layer: BaseTunerLayer, adapter: str) -> dict[str, Tensor]:
    """Returns what a file contains of a layer, or nothing if it does not have this adapter."""
    tensors = {name: _copy(factor) for name, factor in _factors(layer, adapter).items()}
    if not isinstance(layer, LoraLayer) or not tensors:
        return tensors
    if adapter == ADAPTER and getattr(layer, "starts_large", False):
        down, up = tensors[DOWN], tensors[UP]
        if hasattr(layer, "start_down"):
            down = torch.cat([down, _copy(layer.start_down)])
            up = torch.cat([up, -_copy(layer.start_up)], dim=1)
        tensors |= _refactored(up, down)
    if adapter in layer.lora_magnitude_vector:
        norms = _copy(layer.lora_magnitude_vector[adapter].weight)
        tensors["dora_scale"] = norms.reshape(-1, *[1] * (tensors[DOWN].dim() - 1))
    return tensors


def _refactored(up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """Returns the same product with factors along its singular vectors.

    The product is B A, or B A - B0 A0 with twice the rank. If A and B start large, rounding them
    to fp16 would make an error as large as the learned change.
    """
    left, values, right = decompose(up.double().flatten(1), down.double())
    rank, root = len(values), values.sqrt()
    new_down = (root[:, None] * right).float().reshape(rank, *down.shape[1:])
    new_up = (left * root).float().reshape(len(up), rank, *up.shape[2:])
    return {DOWN: new_down, UP: new_up}

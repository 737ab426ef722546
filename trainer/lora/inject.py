"""The adapter in the model: made, found, counted. W' = W + delta W with W frozen.

LoRA is delta W = scale B A (Hu et al. 2021, arXiv:2106.09685), on convolutions too (LoCon, Yeh et al. 2023, arXiv:2309.14859, section 3);
rsLoRA scales by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732); DoRA trains the lengths of the rows apart (Liu et al. 2024,
arXiv:2402.09353); LoHa and LoKr are Hadamard and Kronecker products (Yeh et al. 2023, sections 3.2 and 3.3).
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from trainer.lora.formats.adapted_module import AdaptedModule, decompose, kind_of
from trainer.lora.fused_linear import fuse
from trainer.lora.initialization import ADAPTER, _start
from trainer.lora.targets import Target, choose_targets
from trainer.models.seeds import seed_for

ADAPTERS: dict[str, Callable[[config.Adapter, dict[str, Any]], PeftConfig]] = {
    "lora": lambda adapter, common: _lora(adapter, common),
    "rslora": lambda adapter, common: _lora(adapter, common, use_rslora=True),
    "dora": lambda adapter, common: _lora(adapter, common, use_dora=True),
    "loha": lambda adapter, common: LoHaConfig(
        alpha=adapter.alpha,
        rank_dropout=adapter.rank_dropout,
        module_dropout=adapter.module_dropout,
        **common,
    ),
    "lokr": lambda adapter, common: LoKrConfig(
        alpha=adapter.alpha,
        rank_dropout=adapter.rank_dropout,
        rank_dropout_scale=True,
        module_dropout=adapter.module_dropout,
        decompose_factor=adapter.lokr_factor or -1,
        **common,
    ),
}


def _lora(adapter: config.Adapter, common: dict[str, Any], **kind: bool) -> LoraConfig:
    return LoraConfig(lora_alpha=adapter.alpha, lora_dropout=adapter.dropout, **common, **kind)


def weight_shapes(component: nn.Module) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the weight of every projection, quantised ones too, whose weight is stored in another shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in component.named_modules():
        if isinstance(layer, nn.Linear):
            shapes[name] = (layer.out_features, layer.in_features)
        elif isinstance(layer, nn.Conv2d):
            shapes[name] = tuple(layer.weight.shape)
    return shapes


def targets_of(component: nn.Module, name: str, adapter: config.Adapter) -> list[Target]:
    """The projections of a component that get an adapter; `name` is its own in its pipeline.

    Raises ConfigError where the settings choose nothing, or what PEFT cannot do.
    """
    chosen = choose_targets(adapter, name, weight_shapes(component))
    has_convolutions = any(len(target.shape) == 4 for target in chosen)
    is_half = any(p.dtype in (torch.float16, torch.bfloat16) for p in component.parameters())
    if adapter.kind == "dora" and adapter.dropout and has_convolutions and is_half:
        # PEFT then multiplies float32 inputs with the base's own weights (tried with 0.21.2).
        raise ConfigError(
            f"adapter.dropout does not work with dora on the convolutions of the {name} in half precision; "
            "set it to 0, adapter.targets = attention, or base.precision = fp32."
        )
    return chosen


def inject(component: nn.Module, name: str, adapter: config.Adapter, seed: int) -> None:
    """Puts a fresh adapter on its targets. Its weights are float32 and alone have gradients. Raises ConfigError like `targets_of`."""
    chosen = targets_of(component, name, adapter)
    common = {
        "r": adapter.rank,
        "target_modules": _any_of(target.name for target in chosen),
        "rank_pattern": _pattern(chosen, lambda target: target.rank, adapter.rank),
        "alpha_pattern": _pattern(chosen, lambda target: target.alpha, adapter.alpha),
    }
    # PEFT draws A from the global generator; in half precision it would also keep the adapter in half precision,
    # where an update of a ten-thousandth is lost.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "adapter", type(component).__name__))
        component.add_adapter(ADAPTERS[adapter.kind](adapter, common), adapter_name=ADAPTER)
        cast_training_params(component, torch.float32)
        for target in chosen:
            layer = component.get_submodule(target.name)
            if adapter.init != "default":
                _start(layer, adapter.init)
            if isinstance(layer, LoraLayer) and (adapter.rank_dropout or adapter.module_dropout):
                layer.lora_A[ADAPTER].register_forward_hook(_leaving_out(adapter))
    fuse(component, ADAPTER)
    component.eval()  # fresh layers are in training mode, and would drop out while measuring


def _any_of(names: Iterator[str]) -> str:
    """A regular expression for exactly these paths: PEFT would take plain names for ends of paths."""
    return f"^(?:{'|'.join(map(re.escape, names))})"


def _pattern(
    targets: Sequence[Target], value: Callable[[Target], float], usual: float
) -> dict[str, float]:
    """PEFT's table of the modules that differ: one expression for each value, since it tries them all on every module."""
    values = dict.fromkeys(value(target) for target in targets if value(target) != usual)
    return {_any_of(target.name for target in targets if value(target) == v): v for v in values}


def _leaving_out(adapter: config.Adapter) -> Callable[..., Tensor]:
    """A hook on A: some ranks, or the whole product, are zero in one forward pass. PEFT has this for LoHa and LoKr only.

    Drawn from the global generator, which the step seeds; those that stay are enlarged, as in any dropout, but not whole modules.
    """

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not layer.training:
            return output
        rank = layer.weight.shape[0]
        kept = (
            (torch.rand(rank) >= adapter.rank_dropout)
            / (1 - adapter.rank_dropout)
            * (torch.rand(()) >= adapter.module_dropout)
        )
        return output * kept.to(output).reshape(
            -1, *[1] * (output.dim() - 2 if output.dim() == 4 else 0)
        )

    return hook


def trainable(component: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name; empty where the component has no adapter."""
    return {
        name: parameter
        for name, parameter in component.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def cap_norms(components: Iterable[nn.Module], limit: float) -> None:
    """Shrinks every delta W that is longer than the limit, all its factors alike.

    Max-norm regularisation (Srivastava et al. 2014, JMLR 15, section 5.1) of each layer's change, as in sd-scripts' scale_weight_norms.
    """
    for component in components:
        for layer in component.modules():
            if not isinstance(layer, BaseTunerLayer) or not (factors := _factors(layer, ADAPTER)):
                continue
            norm = AdaptedModule(
                "", "", kind_of(factors), factors, layer.scaling[ADAPTER]
            ).delta.norm()
            shrinking = (limit / norm).clamp(max=1) ** (
                1 / len(factors)
            )  # without a question, for which a GPU would have to wait
            for factor in factors.values():
                factor *= shrinking


def starts(component: nn.Module) -> dict[str, Tensor]:
    """What is taken off of adapters that do not start at zero. Kept with the state: decompositions differ between machines."""
    return {
        name: buffer
        for name, buffer in component.named_buffers()
        if name.endswith((".start_down", ".start_up"))
    }


@contextmanager
def switched_off(components: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, the components are those of the base alone."""
    layers = [
        layer
        for component in components
        for layer in component.modules()
        if isinstance(layer, BaseTunerLayer)
    ]
    # PEFT's own switch also takes the gradients from the adapter's parameters, and gives them back to all.
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
    """Every projection of the given components that has this adapter, weights copied to the CPU in float32."""
    for component, model in components.items():
        for name, layer in model.named_modules():
            if isinstance(layer, BaseTunerLayer) and (tensors := _tensors(layer, adapter)):
                yield AdaptedModule(
                    component, name, kind_of(tensors), tensors, layer.scaling[adapter]
                )


def _copy(weights: Tensor) -> Tensor:
    return weights.detach().float().cpu().clone()


def _factors(layer: BaseTunerLayer, adapter: str) -> dict[str, nn.Parameter]:
    """What delta W is the product of, by the names in a file; the layer's own, not copies."""
    if not isinstance(layer, LoraLayer):
        parts = {name: getattr(layer, name) for name in layer.adapter_layer_names}
        return {name: part[adapter] for name, part in parts.items() if adapter in part}
    if adapter not in layer.lora_A:
        return {}
    return {
        "lora_down.weight": layer.lora_A[adapter].weight,
        "lora_up.weight": layer.lora_B[adapter].weight,
    }


def _tensors(layer: BaseTunerLayer, adapter: str) -> dict[str, Tensor]:
    """What a file holds of a layer; empty where it has no such adapter."""
    tensors = {name: _copy(factor) for name, factor in _factors(layer, adapter).items()}
    if not isinstance(layer, LoraLayer) or not tensors:
        return tensors
    if adapter == ADAPTER and getattr(layer, "starts_large", False):
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        if hasattr(layer, "start_down"):
            down, up = (
                torch.cat([down, _copy(layer.start_down)]),
                torch.cat([up, -_copy(layer.start_up)], dim=1),
            )
        tensors |= _as_one_product(up, down)
    if adapter in layer.lora_magnitude_vector:
        lengths = _copy(layer.lora_magnitude_vector[adapter].weight)
        tensors["dora_scale"] = lengths.reshape(-1, *[1] * (tensors["lora_down.weight"].dim() - 1))
    return tensors


def _as_one_product(up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """B A, or B A - B0 A0 with twice the rank, by its own directions: where A and B start large, rounding them to fp16 would leave an
    error as large as what was learned."""
    left, sizes, right = decompose(up.double().flatten(1), down.double())
    root = sizes.sqrt()
    shaped = (root[:, None] * right).float().reshape(len(root), *down.shape[1:])
    return {
        "lora_down.weight": shaped,
        "lora_up.weight": (left * root).float().reshape(len(up), len(root), *up.shape[2:]),
    }

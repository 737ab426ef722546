"""The adapter in the model: made, found, counted. W' = W + scale B A with W frozen, A random, B zero (Hu et al. 2021, arXiv:2106.09685)."""

from collections.abc import Callable, Iterator, Sequence

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from trainer import config
from trainer.adapted import AdaptedModule
from trainer.batches import seed_for

ADAPTER = "atelier"  # the name of the adapter inside PEFT's layers

ADAPTERS: dict[str, Callable[[config.Adapter, Sequence[str]], LoraConfig]] = {
    "lora": lambda adapter, targets: LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=adapter.dropout, target_modules=list(targets)
    ),
}


def inject(component: nn.Module, adapter: config.Adapter, targets: Sequence[str], seed: int) -> None:
    """Puts a fresh adapter on every projection whose name ends as one of the targets. Its weights are float32 and alone have gradients."""
    # PEFT draws A from the global generator; in half precision it would also keep the adapter in half precision,
    # where an update of a ten-thousandth is lost.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "adapter", type(component).__name__))
        component.add_adapter(ADAPTERS["lora"](adapter, targets), adapter_name=ADAPTER)
    cast_training_params(component, torch.float32)
    component.eval()  # fresh layers are in training mode, and would drop out while measuring


def trainable(component: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name; empty where the component has no adapter."""
    return {name: parameter for name, parameter in component.named_parameters() if parameter.requires_grad}


def adapted_modules(components: dict[str, nn.Module], adapter: str = ADAPTER) -> Iterator[AdaptedModule]:
    """Every projection of the given components that has this adapter, weights copied to the CPU in float32."""
    for component, model in components.items():
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLayer) and adapter in layer.lora_A:
                down, up = (weights[adapter].weight.detach().float().cpu().clone() for weights in (layer.lora_A, layer.lora_B))
                yield AdaptedModule(component, name, "lora", {"lora_down.weight": down, "lora_up.weight": up}, layer.scaling[adapter])

"""Training goes on from an adapter file of any dialect: its kind must be that of the settings, its rank is taken over."""

from collections.abc import Collection, Mapping

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from trainer import config
from trainer.errors import ConfigError, ModelError
from trainer.families import LoadedBase
from trainer.lora.apply import find_modules
from trainer.lora.formats.adapted_module import AdaptedModule, common_alpha, kind_of
from trainer.lora.formats.reader import AdapterFile
from trainer.lora.inject import ADAPTER


def settings_from(adapter: config.Adapter, file: AdapterFile, base: LoadedBase) -> config.Adapter:
    """The settings with the ranks and the alpha of the file. Raises ConfigError where the kind differs, ModelError where the base does."""
    find_modules(base, file)
    kinds = {kind_of(module.tensors) for module in file.modules}
    wanted = "lora" if adapter.kind == "rslora" else adapter.kind
    if kinds != {wanted}:
        raise ConfigError(
            f"adapter.start_from = {file.path.name} is a {' and '.join(sorted(kinds))}, and adapter.kind is {adapter.kind}; "
            "set it to that of the file."
        )
    ranks = [module.rank for module in file.modules if module.rank and not _is_conv(module)]
    conv_ranks = [module.rank for module in file.modules if module.rank and _is_conv(module)]
    rank = max(ranks or conv_ranks or [adapter.rank])
    return adapter.model_copy(
        update={
            "rank": rank,
            "alpha": common_alpha(file.modules),
            "conv_rank": max(conv_ranks, default=0),
            "ranks": "",
        }
    )


def _is_conv(module: AdaptedModule) -> bool:
    return any(side > 1 for side in module.to("meta").delta.shape[2:])


def check_covered(file: AdapterFile, targets: Mapping[str, Collection[str]]) -> None:
    """Raises ConfigError where the settings do not train what the file holds; `targets` are the adapted layers of each component."""
    for module in file.modules:
        if module.component not in targets:
            raise ConfigError(
                f"{file.path.name} has an adapter in the {module.component}, which is not trained; set its learning rate above 0."
            )
        if not {module.name, f"text_model.{module.name}"} & set(targets[module.component]):
            raise ConfigError(
                f"{file.path.name} has an adapter on {module.component}.{module.name}, which adapter.targets leaves out; widen them."
            )


@torch.no_grad()
def start(file: AdapterFile, components: Mapping[str, nn.Module]) -> None:
    """Puts the weights of the file into the adapters in the model. Those that the file lacks stay as they begin, at nothing.

    A module of a smaller rank than the largest gets more ranks whose B is zero. `check_covered` comes before.
    """
    for module in file.modules:
        layer = _layer(components[module.component], module.name)
        factor = module.scale / layer.scaling[ADAPTER]
        if isinstance(layer, LoraLayer):
            _start_pair(file, module, layer, factor)
        else:
            _start_product(file, module, layer, factor)


def _layer(component: nn.Module, name: str) -> nn.Module:
    for path in (name, f"text_model.{name}"):
        try:
            layer = component.get_submodule(path)
        except AttributeError:
            continue
        if ADAPTER in getattr(layer, "scaling", {}):
            return layer
    raise KeyError(name)


def _start_pair(file: AdapterFile, module: AdaptedModule, layer: LoraLayer, factor: float) -> None:
    down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    own_down, own_up = (module.tensors[leaf] for leaf in ("lora_down.weight", "lora_up.weight"))
    if (
        "lora_mid.weight" in module.tensors
        or own_down.shape[1:] != down.shape[1:]
        or own_down.shape[0] > down.shape[0]
    ):
        raise ModelError(
            f"{file.path.name} cannot be gone on with: {module.name} has a form that is not trained here (shape {[*own_down.shape]})."
        )
    rank = own_down.shape[0]
    down[:rank] = own_down.to(down)
    up.zero_()
    up[:, :rank] = (own_up * factor).to(up)
    if ADAPTER in layer.lora_magnitude_vector:
        lengths = layer.lora_magnitude_vector[ADAPTER].weight
        lengths.copy_(module.tensors["dora_scale"].reshape(lengths.shape))


def _start_product(
    file: AdapterFile, module: AdaptedModule, layer: nn.Module, factor: float
) -> None:
    for leaf, tensor in module.tensors.items():
        weights = getattr(layer, leaf, {})
        if ADAPTER not in weights or weights[ADAPTER].shape != tensor.shape:
            raise ModelError(
                f"{file.path.name} cannot be gone on with: {leaf} of {module.name} has the shape {[*tensor.shape]}, "
                "which these settings do not give."
            )
        weights[ADAPTER].copy_(
            tensor * factor if leaf in ("hada_w1_a", "lokr_w1", "lokr_w1_a") else tensor
        )

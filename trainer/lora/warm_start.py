"""Continues training from an adapter file of any format.

The file must be of the kind in the settings. Its ranks and alpha replace those in the settings.
"""

from collections.abc import Collection, Mapping

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from trainer import config
from trainer.errors import ConfigError, ModelError
from trainer.families import LoadedBase
from trainer.lora.apply import find_modules
from trainer.lora.formats.adapted_module import DOWN, MID, UP, AdaptedModule, common_alpha, kind_of
from trainer.lora.formats.reader import AdapterFile
from trainer.lora.inject import ADAPTER

SCALED_FACTORS = ("hada_w1_a", "lokr_w1", "lokr_w1_a")
"""The factor of a LoHa or LoKr that takes the difference between two scales."""


def settings_from(adapter: config.Adapter, file: AdapterFile, base: LoadedBase) -> config.Adapter:
    """Returns the settings with the ranks and the alpha of a file.

    Raises ConfigError if the file is of another kind, and ModelError if it does not fit the base.
    """
    find_modules(base, file)
    kinds = {kind_of(module.tensors) for module in file.modules}
    expected = "lora" if adapter.kind == "rslora" else adapter.kind
    if kinds != {expected}:
        raise ConfigError(
            f"adapter.start_from = {file.path.name} is a {' and '.join(sorted(kinds))}, but "
            f"adapter.kind is {adapter.kind}. Set it to the kind of the file."
        )
    ranks: list[int] = []
    conv_ranks: list[int] = []
    for module in file.modules:
        if module.rank:
            (conv_ranks if _is_conv(module) else ranks).append(module.rank)
    changes = {
        "rank": max(ranks or conv_ranks or [adapter.rank]),
        "alpha": common_alpha(file.modules),
        "conv_rank": max(conv_ranks, default=0),
        "ranks": "",
    }
    return adapter.model_copy(update=changes)


def _is_conv(module: AdaptedModule) -> bool:
    return any(side > 1 for side in module.to("meta").delta.shape[2:])


def check_covered(file: AdapterFile, targets: Mapping[str, Collection[str]]) -> None:
    """Raises ConfigError if the settings do not train a module of the file.

    `targets` are the paths of the adapted layers by component.
    """
    for module in file.modules:
        if module.component not in targets:
            raise ConfigError(
                f"{file.path.name} has an adapter in the {module.component}, which is not "
                "trained. Set its learning rate above 0."
            )
        if not {module.name, f"text_model.{module.name}"} & set(targets[module.component]):
            raise ConfigError(
                f"{file.path.name} has an adapter on {module.component}.{module.name}, which "
                "adapter.targets leaves out. Choose a wider setting."
            )


def load_weights(file: AdapterFile, components: Mapping[str, nn.Module]) -> None:
    """Copies the weights of a file into the adapters of a model. Call `check_covered` first.

    Layers that the file lacks keep their initial weights. If a module has a smaller rank than
    the layer, B is zero in the other ranks. Raises ModelError if a shape does not fit.
    """
    with torch.no_grad():
        for module in file.modules:
            layer = _adapted_layer(components[module.component], module.name)
            ratio = module.scale / layer.scaling[ADAPTER]
            if isinstance(layer, LoraLayer):
                _load_pair(file, module, layer, ratio)
            else:
                _load_factors(file, module, layer, ratio)


def _adapted_layer(component: nn.Module, name: str) -> nn.Module:
    for path in (name, f"text_model.{name}"):
        try:
            layer = component.get_submodule(path)
        except AttributeError:
            continue
        if ADAPTER in getattr(layer, "scaling", {}):
            return layer
    raise KeyError(name)


def _load_pair(file: AdapterFile, module: AdaptedModule, layer: LoraLayer, ratio: float) -> None:
    """Copies A and B, and the norms of a DoRA. The ratio of the scales is multiplied into B."""
    down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    file_down, file_up = module.tensors[DOWN], module.tensors[UP]
    rank = file_down.shape[0]
    fits = file_down.shape[1:] == down.shape[1:] and rank <= down.shape[0]
    if MID in module.tensors or not fits:
        raise ModelError(
            f"Cannot continue from {file.path.name}: {module.name} has the unsupported shape "
            f"{[*file_down.shape]}."
        )
    down[:rank] = file_down.to(down)
    up.zero_()
    up[:, :rank] = (file_up * ratio).to(up)
    if ADAPTER in layer.lora_magnitude_vector:
        norms = layer.lora_magnitude_vector[ADAPTER].weight
        norms.copy_(module.tensors["dora_scale"].reshape(norms.shape))


def _load_factors(file: AdapterFile, module: AdaptedModule, layer: nn.Module, ratio: float) -> None:
    """Copies the factors of a LoHa or LoKr."""
    for leaf, tensor in module.tensors.items():
        weights = getattr(layer, leaf, {})
        if ADAPTER not in weights or weights[ADAPTER].shape != tensor.shape:
            raise ModelError(
                f"Cannot continue from {file.path.name}: {leaf} of {module.name} has the shape "
                f"{[*tensor.shape]}, which does not fit these settings."
            )
        weights[ADAPTER].copy_(tensor * ratio if leaf in SCALED_FACTORS else tensor)

"""Applies adapters to a loaded base, each at its own strength.

The output of a layer becomes W x + s1 delta W1 x + s2 delta W2 x + ... The base's weights never
change: without an adapter, or at strength 0, the outputs are identical to the base's.
Every kind is exact at every strength. diffusers' own loader reads neither LoHa nor LoKr.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trainer.errors import ModelError
from trainer.families import LoadedBase, families_of_adapter
from trainer.lora.formats.adapted_module import DOWN, UP, AdaptedModule
from trainer.lora.formats.reader import AdapterFile


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter file and its strengths."""

    file: AdapterFile
    strength: float
    """In the denoiser."""
    text_strength: float
    """In the text encoders."""

    def strength_of(self, component: str) -> float:
        return self.text_strength if component.startswith("text_encoder") else self.strength


class Stack:
    """The adapters that are applied to a base. Use one stack for each base."""

    def __init__(self, base: LoadedBase) -> None:
        self._base = base
        self._hooks: list[RemovableHandle] = []

    def apply(self, adapters: Sequence[WeightedAdapter]) -> None:
        """Replaces the applied adapters by these.

        Raises ModelError if a file does not fit the base. Then no adapter is applied.
        """
        self.clear()
        # Every file is checked before the first hook is added.
        matched = [(adapter, find_modules(self._base, adapter.file)) for adapter in adapters]
        for adapter, modules in matched:
            for module, layer in modules:
                strength = adapter.strength_of(module.component)
                if strength:
                    hook = partial(_add_to_output, contribution(module, layer, strength))
                    self._hooks.append(layer.register_forward_hook(hook))

    def clear(self) -> None:
        """Removes all adapters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _add_to_output(
    added: Callable[[Tensor], Tensor], layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """A forward hook: adds the contribution of an adapter."""
    return output + added(inputs[0])


def contribution(
    module: AdaptedModule, layer: nn.Module, strength: float
) -> Callable[[Tensor], Tensor]:
    """Returns the function that computes what an adapter adds to the output of its layer.

    A plain low-rank pair remains two products. Any other kind becomes one weight.
    """
    with torch.no_grad():
        weight = layer.weight
        if not module.is_plain_lora:
            change = module.change(weight.detach().float().cpu())
            delta = strength * change.to(weight.device, weight.dtype)
            if isinstance(layer, nn.Conv2d):
                return lambda x: _convolve(layer, x, delta)
            return lambda x: F.linear(x, delta)

        down = module.tensors[DOWN].to(weight.device).to(weight.dtype)
        up = module.tensors[UP].to(weight.device) * (module.scale * strength)
        up = up.to(weight.dtype)
        if isinstance(layer, nn.Conv2d):
            return lambda x: F.conv2d(_convolve(layer, x, down), up.reshape(*up.shape[:2], 1, 1))
        return lambda x: F.linear(F.linear(x, down.flatten(1)), up.flatten(1))


def _convolve(layer: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    """Convolves with another weight, at the stride, padding and dilation of a layer."""
    weight = weight.reshape(*weight.shape[:2], *layer.kernel_size)
    return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation)


def find_modules(base: LoadedBase, file: AdapterFile) -> list[tuple[AdaptedModule, nn.Module]]:
    """Returns each module of a file with its layer in the base.

    Raises ModelError if the file is for another family or does not fit.
    """
    families, name = families_of_adapter(file), base.files.path.name
    if families and base.family.name not in families:
        raise ModelError(
            f"{file.path.name} is an adapter for {' or '.join(families)}, and the base model "
            f"{name} is a {base.family.name}."
        )
    found = []
    for module in file.modules:
        layer = find_layer(base.components.get(module.component), module.name)
        if layer is None or not _fits(module, layer.weight):
            problem = "does not exist there" if layer is None else "has another size"
            raise ModelError(
                f"{file.path.name} does not fit the base model {name} ({base.family.name}): it "
                f"was trained on another one. Its {module.component}.{module.name} {problem}."
            )
        found.append((module, layer))
    return found


def _fits(module: AdaptedModule, weight: Tensor) -> bool:
    """Whether delta W has the size of the weight. The stored shapes of convolutions differ."""
    delta = module.to("meta").delta
    has_outputs = bool(delta.shape[0] == weight.shape[0])
    return has_outputs and delta.numel() == weight.numel()


def find_layer(component: nn.Module | None, name: str) -> nn.Module | None:
    """Returns a linear layer or convolution by its path, or None.

    Text encoders may have the additional level `text_model`.
    """
    if component is None:
        return None
    for path in (name, f"text_model.{name}"):
        try:
            layer = component.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(layer, nn.Linear | nn.Conv2d):
            return layer
    return None

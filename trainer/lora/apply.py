"""Adapters on a loaded base, each at its own strength: W x + s1 delta W1 x + s2 delta W2 x + ...

The base's weights are never touched, so that without an adapter, or at strength 0, it is the base to the bit.
Every kind is exact at every strength; diffusers' own loader reads neither LoHa nor LoKr.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trainer.errors import ModelError
from trainer.families import LoadedBase, families_of_adapter
from trainer.lora.formats.adapted_module import AdaptedModule
from trainer.lora.formats.reader import AdapterFile


@dataclass(frozen=True)
class WeightedAdapter:
    """A file with its strengths."""

    file: AdapterFile
    strength: float
    text_strength: float

    def strength_of(self, component: str) -> float:
        return self.text_strength if component.startswith("text_encoder") else self.strength


class Stack:
    """What lies on a base. One at a time: `lay` takes away what was there before."""

    def __init__(self, base: LoadedBase):
        self._base = base
        self._hooks: list[RemovableHandle] = []

    @torch.no_grad()
    def apply(self, layers: Sequence[WeightedAdapter]) -> None:
        """Raises ModelError, and leaves the base bare, where a file does not fit it."""
        self.clear()
        found = [(layer, find_modules(self._base, layer.file)) for layer in layers]
        for layer, modules in found:
            for module, target in modules:
                if strength := layer.strength_of(module.component):
                    add = contribution(module, target, strength)
                    self._hooks.append(
                        target.register_forward_hook(
                            lambda _, inputs, output, add=add: output + add(inputs[0])
                        )
                    )

    def clear(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def contribution(
    module: AdaptedModule, target: nn.Module, strength: float
) -> Callable[[Tensor], Tensor]:
    """What an adapter adds to the output of its module. The low-rank pair stays a pair; other kinds are multiplied out once."""
    weight = target.weight
    if set(module.tensors) == {"lora_down.weight", "lora_up.weight"}:
        down, up = (
            module.tensors[leaf].to(weight.device)
            for leaf in ("lora_down.weight", "lora_up.weight")
        )
        down, up = down.to(weight.dtype), (up * (module.scale * strength)).to(weight.dtype)
        if isinstance(target, nn.Conv2d):
            return lambda x: F.conv2d(_convolve(target, x, down), up.reshape(*up.shape[:2], 1, 1))
        return lambda x: F.linear(F.linear(x, down.flatten(1)), up.flatten(1))
    delta = strength * module.change(weight.detach().float().cpu()).to(weight.device, weight.dtype)
    return (
        (lambda x: _convolve(target, x, delta))
        if isinstance(target, nn.Conv2d)
        else (lambda x: F.linear(x, delta))
    )


def _convolve(target: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    weight = weight.reshape(*weight.shape[:2], *target.kernel_size)
    return F.conv2d(x, weight, None, target.stride, target.padding, target.dilation)


def find_modules(base: LoadedBase, file: AdapterFile) -> list[tuple[AdaptedModule, nn.Module]]:
    """The module of the base that each record belongs to. Raises ModelError where the file is of another family or does not fit."""
    families, name = families_of_adapter(file), base.files.path.name
    if families and base.family.name not in families:
        raise ModelError(
            f"{file.path.name} is an adapter for {' or '.join(families)}, and the base model {name} is a {base.family.name}."
        )
    parts, found = base.components, []
    for module in file.modules:
        target = _submodule(parts.get(module.component), module.name)
        delta = module.to("meta").delta
        if (
            target is None
            or delta.numel() != target.weight.numel()
            or delta.shape[0] != target.weight.shape[0]
        ):
            raise ModelError(
                f"{file.path.name} does not fit the base model {name} ({base.family.name}): it was trained on another one. "
                f"Its {module.component}.{module.name} {'is not there' if target is None else 'has another size'}."
            )
        found.append((module, target))
    return found


def _submodule(part: nn.Module | None, name: str) -> nn.Module | None:
    """A projection by its path; text encoders may have the level `text_model` on top."""
    if part is None:
        return None
    for path in (name, f"text_model.{name}"):
        try:
            found = part.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(found, nn.Linear | nn.Conv2d):
            return found
    return None

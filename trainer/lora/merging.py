"""Adapters merged into the weights of a base."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.errors import ModelError
from trainer.families import LoadedBase
from trainer.lora.apply import WeightedAdapter, find_modules
from trainer.lora.formats.stability_names import checkpoint_places
from trainer.lora.transform import Progress, quiet


@torch.no_grad()
def merge(
    base: LoadedBase, layers: Sequence[WeightedAdapter], progress: Progress = quiet
) -> dict[tuple[str, str], Tensor]:
    """Adds the adapters to the weights of the base. Returns what was added, by (component, path in it), float64.

    Each adapter sees the base as it was, so that their order does not matter.
    """
    places = {
        id(part): (name, path)
        for name, whole in base.components.items()
        for path, part in whole.named_modules()
    }
    targets: dict[int, tuple[nn.Module, Tensor]] = {}
    found = [
        (layer, module, target)
        for layer in layers
        for module, target in find_modules(base, layer.file)
    ]
    for done, (layer, module, target) in enumerate(found):
        progress(done, len(found))
        if strength := layer.strength_of(module.component):
            added = strength * module.to(torch.float64).change(target.weight.double())
            before = targets.get(id(target), (target, torch.zeros_like(added)))[1]
            targets[id(target)] = (target, before + added)
    for target, added in targets.values():
        target.weight.copy_((target.weight.double() + added).to(target.weight.dtype))
    progress(len(found), len(found))
    return {places[key]: added for key, (_, added) in targets.items()}


@torch.no_grad()
def proof(merged: LoadedBase, plain: LoadedBase, added: dict[tuple[str, str], Tensor]) -> float:
    """The largest difference from the plain base that is left when the adapters are taken off again, as a share of the largest weight."""
    worst = 0.0
    for name, whole in plain.components.items():
        for path, weight in whole.state_dict().items():
            module, _, leaf = path.rpartition(".")
            left = merged.components[name].state_dict()[path].double() - weight.double()
            if leaf == "weight" and (name, module) in added:
                left = left - added[name, module]
            worst = max(
                worst, float(left.abs().max() / weight.double().abs().max().clamp(min=1e-12))
            )
    return worst


def save_base(base: LoadedBase, folder: Path, dtype: torch.dtype) -> None:
    """As a folder in diffusers' layout. The VAE stays in its own precision: in fp16 it can overflow."""
    for part in base.components.values():
        part.to(dtype)
    base.pipe.save_pretrained(folder, safe_serialization=True)


def merged_checkpoint(
    source: Path, plain: LoadedBase, added: Mapping[tuple[str, str], Tensor]
) -> dict[str, Tensor]:
    """The tensors of a single-file base with the adapters in it, each in its own precision; those of other layers stay to the bit.

    Raises ModelError where a layer is not found by its value: a checkpoint of another layout is not guessed at.
    """
    tensors = load_file(source)
    for (component, module), change in added.items():
        weight = plain.components[component].get_submodule(module).weight.detach()
        for key, third in checkpoint_places(component, module):
            stored = tensors.get(key)
            part = stored if third is None or stored is None else stored.chunk(3)[third]
            if (
                part is not None
                and part.numel() == weight.numel()
                and torch.allclose(part.double(), weight.double().reshape(part.shape), atol=1e-3)
            ):
                part.copy_(part.double() + change.reshape(part.shape))  # a chunk is a view
                break
        else:
            raise ModelError(
                f"{source.name} has no place for {component}.{module}; merge into a diffusers folder instead."
            )
    return tensors

"""Merges adapters into the weights of a base."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.errors import ModelError
from trainer.families import LoadedBase
from trainer.lora.apply import WeightedAdapter, find_modules
from trainer.lora.formats.stability_names import checkpoint_keys
from trainer.lora.transform import Progress, no_progress

Changes = dict[tuple[str, str], Tensor]
"""(component, path) -> what was added to a weight, float64."""
STORED_WEIGHT_TOLERANCE = 1e-3
"""Largest difference between a weight in the checkpoint and the loaded one."""


def merge(
    base: LoadedBase, adapters: Sequence[WeightedAdapter], progress: Progress = no_progress
) -> Changes:
    """Adds the adapters to the weights of the base. Returns what was added.

    Each adapter changes the original weights, so their order does not matter. Raises ModelError
    if an adapter does not fit.
    """
    paths = {}
    for component, model in base.components.items():
        for path, layer in model.named_modules():
            paths[id(layer)] = component, path
    matched = []
    for adapter in adapters:
        for module, layer in find_modules(base, adapter.file):
            matched.append((adapter, module, layer))

    # The weights stay unchanged until all changes are known: DoRA reads them.
    changes: dict[int, tuple[nn.Module, Tensor]] = {}
    with torch.no_grad():
        for done, (adapter, module, layer) in enumerate(matched):
            progress(done, len(matched))
            strength = adapter.strength_of(module.component)
            if not strength:
                continue
            change = strength * module.to(torch.float64).change(layer.weight.double())
            if id(layer) in changes:
                change = changes[id(layer)][1] + change
            changes[id(layer)] = layer, change
        for layer, change in changes.values():
            layer.weight.copy_((layer.weight.double() + change).to(layer.weight.dtype))
    progress(len(matched), len(matched))
    return {paths[key]: change for key, (_, change) in changes.items()}


def remaining_difference(merged: LoadedBase, plain: LoadedBase, changes: Changes) -> float:
    """Returns the largest difference from the plain base after the changes are subtracted.

    It is relative to the largest weight of the layer. It is zero apart from rounding if the
    adapters changed nothing else.
    """
    worst = 0.0
    with torch.no_grad():
        for component, model in plain.components.items():
            merged_weights = merged.components[component].state_dict()
            for key, weight in model.state_dict().items():
                path, _, leaf = key.rpartition(".")
                difference = merged_weights[key].double() - weight.double()
                if leaf == "weight" and (component, path) in changes:
                    difference = difference - changes[component, path]
                largest = weight.double().abs().max().clamp(min=1e-12)
                worst = max(worst, float(difference.abs().max() / largest))
    return worst


def save_base(base: LoadedBase, folder: Path, dtype: torch.dtype) -> None:
    """Writes a base as a diffusers folder.

    The VAE keeps its dtype, because in fp16 it can overflow.
    """
    for component in base.components.values():
        component.to(dtype)
    base.pipe.save_pretrained(folder, safe_serialization=True)


def merged_checkpoint(
    source: Path, plain: LoadedBase, changes: Mapping[tuple[str, str], Tensor]
) -> dict[str, Tensor]:
    """Returns the tensors of a single-file base with the changes added, each in its own dtype.

    Other tensors are identical to those in the file. Raises ModelError if no tensor has the
    value of a changed layer, as in a checkpoint with an unknown layout.
    """
    tensors: dict[str, Tensor] = load_file(source)
    for (component, path), change in changes.items():
        weight = plain.components[component].get_submodule(path).weight.detach()
        stored = _stored_weight(tensors, component, path, weight)
        if stored is None:
            raise ModelError(
                f"{source.name} has no weight for {component}.{path}. Merge into a diffusers "
                "folder instead."
            )
        stored.copy_(stored.double() + change.reshape(stored.shape))
    return tensors


def _stored_weight(
    tensors: Mapping[str, Tensor], component: str, path: str, weight: Tensor
) -> Tensor | None:
    """Returns the tensor with the value of a weight, or a view into a fused tensor."""
    for key, index in checkpoint_keys(component, path):
        stored = tensors.get(key)
        if stored is None:
            continue
        if index is not None:
            stored = stored.chunk(3)[index]
        if stored.numel() != weight.numel():
            continue
        expected = weight.double().reshape(stored.shape)
        if torch.allclose(stored.double(), expected, atol=STORED_WEIGHT_TOLERANCE):
            return stored
    return None

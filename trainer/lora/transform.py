"""Operations on existing adapters: compose several, resize one, extract one from two bases.

All sums and decompositions are in float64. The delta W of a module is scale * up @ down, with the
scale alpha / rank of this module.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.errors import ModelError
from trainer.families import FAMILIES, LoadedBase, families_of_adapter
from trainer.families.base import ModelFamily
from trainer.lora.apply import WeightedAdapter
from trainer.lora.formats.adapted_module import DOWN, UP, AdaptedModule, decompose
from trainer.lora.formats.reader import AdapterFile

Progress = Callable[[int, int], None]
"""Called with the number of finished modules and of all modules."""
ROUNDING = 1e-12
"""Singular values below this share of the largest are rounding errors, and so are shares."""


@dataclass(frozen=True)
class ResizedModule:
    """What a resized module keeps."""

    component: str
    name: str
    rank: int
    energy: float
    """The share of the squared singular values that it keeps."""
    size: float
    """The sum of the squared singular values before."""


def no_progress(done: int, total: int) -> None:
    """The default for a caller that shows no progress."""


def family_for(file: AdapterFile, name: str = "") -> ModelFamily:
    """Returns the family by its short name, or by the content of the file.

    Raises ModelError if neither is clear.
    """
    matching = families_of_adapter(file)
    keys = [key for key, family in FAMILIES.items() if family.name in matching]
    if name or len(keys) == 1:
        return FAMILIES[name or keys[0]]
    # The sizes of one family have the same keys, so any of them can write the file.
    if keys and len({FAMILIES[key].kohya_key("text_encoder", "x") for key in keys}) == 1:
        return FAMILIES[keys[0]]
    raise ModelError(
        f"{file.path.name} does not contain the family of its base. Give it with --family "
        f"({', '.join(FAMILIES)})."
    )


def low_rank_pair(module: AdaptedModule) -> tuple[Tensor, Tensor]:
    """Returns delta W as up [out, r] and down [r, in, ...] in float64.

    A LoHa, LoKr or Tucker's form is decomposed by SVD, exact except for rounding. Raises
    ModelError for a DoRA.
    """
    module = module.to(torch.float64)
    if "dora_scale" in module.tensors:
        raise ModelError(
            f"The DoRA on {module.name} cannot be added to other adapters, because its norms "
            "belong to the weights of a base. Merge it into the base instead."
        )
    if module.is_plain_lora:
        return module.scale * module.tensors[UP].flatten(1), module.tensors[DOWN]
    delta = module.delta
    left, values, right = torch.linalg.svd(delta.flatten(1), full_matrices=False)
    rank = max(1, int((values > ROUNDING * values[0]).sum()))
    return left[:, :rank] * values[:rank], right[:rank].reshape(rank, *delta.shape[1:])


def as_module(component: str, name: str, up: Tensor, down: Tensor) -> AdaptedModule:
    """Returns a LoRA with scale 1, thus alpha = rank."""
    up = up.reshape(*up.shape, *[1] * (down.dim() - 2))
    return AdaptedModule(component, name, "lora", {DOWN: down.float(), UP: up.float()}, 1.0)


def compose(adapters: Sequence[WeightedAdapter]) -> list[AdaptedModule]:
    """Returns one adapter with the same effect as all of these, each at its strength.

    The A's of a module are concatenated along the rank, and the B's too, so the ranks add up.
    Raises ModelError if the sizes differ.
    """
    pairs: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
    for adapter in adapters:
        for module in adapter.file.modules:
            strength = adapter.strength_of(module.component)
            if strength:
                up, down = low_rank_pair(module)
                key = module.component, module.name
                pairs.setdefault(key, []).append((strength * up, down))
    composed = []
    for (component, name), own_pairs in pairs.items():
        if len({(up.shape[0], down.shape[1:]) for up, down in own_pairs}) > 1:
            raise ModelError(
                f"The adapters do not fit each other: {component}.{name} has different sizes in "
                "them. They are for different bases."
            )
        up = torch.cat([up for up, _ in own_pairs], dim=1)
        down = torch.cat([down for _, down in own_pairs])
        composed.append(as_module(component, name, up, down))
    return composed


def resize(
    modules: Sequence[AdaptedModule],
    rank: int = 0,
    energy: float = 1.0,
    progress: Progress = no_progress,
) -> tuple[list[AdaptedModule], list[ResizedModule]]:
    """Returns the nearest adapter of at most this rank (0: any), and what each module keeps.

    If the rank allows it, each module keeps at least the share `energy` of its squared singular
    values (Eckart & Young 1936). A module that changes nothing gets rank 1. Raises ModelError for
    a DoRA.
    """
    resized, kept = [], []
    for done, module in enumerate(modules):
        progress(done, len(modules))
        if "dora_scale" in module.tensors:
            raise ModelError(
                f"The DoRA on {module.name} cannot be resized: its norms belong to the exact "
                "direction of the weights. Merge it into the base instead."
            )
        up, down = low_rank_pair(module)
        key = module.component, module.name
        small, report = _truncated(key, decompose(up, down), down.shape[1:], rank, energy)
        resized.append(small)
        kept.append(report)
    progress(len(modules), len(modules))
    return resized, kept


def _truncated(
    key: tuple[str, str],
    decomposition: tuple[Tensor, Tensor, Tensor],
    input_shape: Sequence[int],
    rank: int,
    energy: float,
) -> tuple[AdaptedModule, ResizedModule]:
    """Returns a LoRA of the largest singular values, and what it keeps.

    `key` is the component and the name of the module.
    """
    left, values, right = decomposition
    own_rank, share = choose_rank(values, rank, energy)
    root = values[:own_rank].sqrt()
    down = (root[:, None] * right[:own_rank]).reshape(own_rank, *input_shape)
    size = float(values.square().sum())
    module = as_module(*key, left[:, :own_rank] * root, down)
    return module, ResizedModule(*key, own_rank, share, size)


def choose_rank(values: Tensor, rank: int, energy: float) -> tuple[int, float]:
    """Returns the number of singular values to keep, and the share of their squares.

    `rank` is the largest number (0: any), `energy` the smallest share.
    """
    squares = values.square()
    total = float(squares.sum())
    if not total:
        return 1, 1.0
    shares = squares.cumsum(0) / total
    sufficient = int((shares < energy - ROUNDING).sum()) + 1
    own_rank = max(1, min(sufficient, rank or sufficient, len(values)))
    return own_rank, float(shares[own_rank - 1])


def total_energy(kept: Sequence[ResizedModule]) -> float:
    """Returns the share of all squared singular values that the whole adapter keeps."""
    total = sum(module.size for module in kept)
    return sum(module.energy * module.size for module in kept) / total if total else 1.0


def energy_by_rank(modules: Sequence[AdaptedModule]) -> list[tuple[int, float, float]]:
    """Returns what an adapter would keep at the ranks 1, 2, 4, ... up to its largest rank.

    Each row is the rank, the share of all squared singular values, and the smallest share of a
    module. A DoRA has no rows, because it cannot be resized without its base.
    """
    if any("dora_scale" in module.tensors for module in modules):
        return []
    spectra = [decompose(*low_rank_pair(module))[1].square() for module in modules]
    spectra = [squares for squares in spectra if float(squares.sum())]
    if not spectra:
        return []
    largest = max(len(squares) for squares in spectra)
    total = float(sum(squares.sum() for squares in spectra))
    rows = []
    for rank in [2**power for power in range(10) if 2**power < largest] + [largest]:
        kept = [float(squares[:rank].sum()) for squares in spectra]
        shares = [part / float(squares.sum()) for part, squares in zip(kept, spectra, strict=True)]
        rows.append((rank, sum(kept) / total, min(shares)))
    return rows


def extract(
    plain: LoadedBase,
    tuned: LoadedBase,
    rank: int,
    energy: float = 1.0,
    conv: bool = False,
    progress: Progress = no_progress,
) -> tuple[list[AdaptedModule], list[ResizedModule]]:
    """Returns the LoRA that is nearest to the difference of two bases, and what it keeps.

    It covers all linear layers, and with `conv` the convolutions. Raises ModelError if the bases
    are not two versions of one model, or do not differ.
    """
    if plain.family.name != tuned.family.name:
        raise ModelError(
            f"The bases are of different families, {plain.family.name} and {tuned.family.name}. "
            "An adapter can only be extracted from two bases of one family."
        )
    changed = list(differences(plain, tuned, conv))
    if not changed:
        raise ModelError("The two bases do not differ in any layer that an adapter can change.")
    modules, kept = [], []
    for done, (component, name, delta) in enumerate(changed):
        progress(done, len(changed))
        decomposition = torch.linalg.svd(delta.flatten(1), full_matrices=False)
        key = component, name
        small, report = _truncated(key, decomposition, delta.shape[1:], rank, energy)
        modules.append(small)
        kept.append(report)
    progress(len(changed), len(changed))
    return modules, kept


def differences(
    plain: LoadedBase, tuned: LoadedBase, conv: bool
) -> Iterator[tuple[str, str, Tensor]]:
    """Yields (component, path, tuned - plain) in float64 for each layer in which two bases differ.

    Only layers that can have an adapter are compared.
    """
    family = plain.family
    for component in (family.denoiser_name, *family.trainable_text_encoders(plain.pipe)):
        for name, layer in plain.components[component].named_modules():
            if not isinstance(layer, nn.Linear) and not (conv and isinstance(layer, nn.Conv2d)):
                continue
            weight = tuned.components[component].get_submodule(name).weight
            if weight.shape != layer.weight.shape:
                raise ModelError(
                    f"The bases differ in size at {component}.{name}. They are not two versions "
                    "of one model."
                )
            delta = (weight.double() - layer.weight.double()).detach()
            if delta.any():
                yield component, name, delta

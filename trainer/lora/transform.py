"""What can be done with adapters that are already there: put into one, made smaller, merged into a base, told apart from two bases.

All sums and decompositions are in float64. Truth is scale * up @ down, with the scale alpha / rank of each module.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.errors import ModelError
from trainer.families import FAMILIES, LoadedBase, families_of_adapter
from trainer.families.base import ModelFamily
from trainer.lora.apply import WeightedAdapter
from trainer.lora.formats.adapted_module import AdaptedModule, decompose
from trainer.lora.formats.reader import AdapterFile

Progress = Callable[[int, int], None]
NOTHING = 1e-12  # singular values below this share of the largest are rounding


@dataclass(frozen=True)
class Kept:
    """What is left of a module: the share of its squared singular values."""

    component: str
    name: str
    rank: int
    energy: float
    size: float
    """Sum of its squared singular values before."""


def family_for(file: AdapterFile, name: str = "") -> ModelFamily:
    """The family by its short name, or as the file tells. Raises ModelError where it does not tell."""
    found = [key for key, family in FAMILIES.items() if family.name in families_of_adapter(file)]
    if name or len(found) == 1:
        return FAMILIES[name or found[0]]
    if found and len({FAMILIES[key].export_key("text_encoder", "x") for key in found}) == 1:
        return FAMILIES[found[0]]  # of the sizes of one family, which are named alike
    raise ModelError(
        f"{file.path.name} does not tell its family; say it with --family ({', '.join(FAMILIES)})."
    )


def quiet(done: int, total: int) -> None:
    """No progress shown."""


def pair(module: AdaptedModule) -> tuple[Tensor, Tensor]:
    """delta W as up [out, r] @ down [r, in, ...], float64. Whole products are split by SVD, exactly but for rounding."""
    module = module.to(torch.float64)
    if "dora_scale" in module.tensors:
        raise ModelError(
            f"The DoRA on {module.name} cannot be added to others without its base, whose lengths it sets; merge it instead."
        )
    if set(module.tensors) == {"lora_down.weight", "lora_up.weight"}:
        return module.scale * module.tensors["lora_up.weight"].flatten(1), module.tensors[
            "lora_down.weight"
        ]
    delta = module.delta
    left, sizes, right = torch.linalg.svd(delta.flatten(1), full_matrices=False)
    rank = max(1, int((sizes > NOTHING * sizes[0]).sum()))
    return left[:, :rank] * sizes[:rank], right[:rank].reshape(rank, *delta.shape[1:])


def as_module(component: str, name: str, up: Tensor, down: Tensor) -> AdaptedModule:
    """A LoRA of scale 1, with alpha = rank."""
    up = up.reshape(*up.shape, *[1] * (down.dim() - 2))
    return AdaptedModule(
        component,
        name,
        "lora",
        {"lora_down.weight": down.float(), "lora_up.weight": up.float()},
        1.0,
    )


def compose(layers: Sequence[WeightedAdapter]) -> list[AdaptedModule]:
    """One adapter that does what these do together: A's under each other, B's beside each other. The ranks add up."""
    pairs: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
    for layer in layers:
        for module in layer.file.modules:
            if strength := layer.strength_of(module.component):
                up, down = pair(module)
                pairs.setdefault((module.component, module.name), []).append((strength * up, down))
    composed = []
    for (component, name), found in pairs.items():
        if len({(up.shape[0], down.shape[1:]) for up, down in found}) > 1:
            raise ModelError(
                f"The adapters do not fit each other: {component}.{name} has several sizes. They are of different bases."
            )
        composed.append(
            as_module(
                component,
                name,
                torch.cat([up for up, _ in found], 1),
                torch.cat([down for _, down in found]),
            )
        )
    return composed


def resize(
    modules: Sequence[AdaptedModule], rank: int = 0, energy: float = 1.0, progress: Progress = quiet
) -> tuple[list[AdaptedModule], list[Kept]]:
    """The nearest adapter of at most this rank (0: any) that keeps at least this share of each module's squared singular values, where
    the rank allows it (Eckart & Young 1936). A module that does nothing becomes one of rank 1 that does nothing."""
    resized, kept = [], []
    for done, module in enumerate(modules):
        progress(done, len(modules))
        if "dora_scale" in module.tensors:
            raise ModelError(
                f"The DoRA on {module.name} cannot be resized: its lengths belong to the direction as it is. Merge it instead."
            )
        up, down = pair(module)
        left, sizes, right = decompose(up, down)
        own, share = choose_rank(sizes, rank, energy)
        root = sizes[:own].sqrt()
        new_down = (root[:, None] * right[:own]).reshape(own, *down.shape[1:])
        resized.append(as_module(module.component, module.name, left[:, :own] * root, new_down))
        kept.append(Kept(module.component, module.name, own, share, float(sizes.square().sum())))
    progress(len(modules), len(modules))
    return resized, kept


def choose_rank(sizes: Tensor, rank: int, energy: float) -> tuple[int, float]:
    """How many singular values are kept, and which share of their squares that is."""
    squares = sizes.square()
    total = float(squares.sum())
    if not total:
        return 1, 1.0
    shares = squares.cumsum(0) / total
    wanted = int((shares < energy - 1e-12).sum()) + 1
    own = max(1, min(wanted, rank or wanted, len(sizes)))
    return own, float(shares[own - 1])


def whole_energy(kept: Sequence[Kept]) -> float:
    """Of a file: the share of all squared singular values."""
    total = sum(module.size for module in kept)
    return sum(module.energy * module.size for module in kept) / total if total else 1.0


def energy_by_rank(modules: Sequence[AdaptedModule]) -> list[tuple[int, float, float]]:
    """(rank, share that is kept of the whole, least share that is kept of a module) for 1, 2, 4, ... up to the largest rank.

    A DoRA has none, since it cannot be resized by itself.
    """
    if any("dora_scale" in module.tensors for module in modules):
        return []
    squares = [decompose(*pair(module))[1].square() for module in modules]
    squares = [square for square in squares if float(square.sum())]
    largest = max((len(square) for square in squares), default=0)
    rows, total = [], float(sum(square.sum() for square in squares))
    for rank in [2**power for power in range(10) if 2**power < largest] + [largest] * bool(largest):
        kept = [float(square[:rank].sum()) for square in squares]
        worst = min(part / float(square.sum()) for part, square in zip(kept, squares, strict=True))
        rows.append((rank, sum(kept) / total, worst))
    return rows


def extract(
    plain: LoadedBase,
    tuned: LoadedBase,
    rank: int,
    energy: float = 1.0,
    conv: bool = False,
    progress: Progress = quiet,
) -> tuple[list[AdaptedModule], list[Kept]]:
    """The nearest LoRA to the difference of two bases, on all linear layers, and on the convolutions too where wanted."""
    if plain.family.name != tuned.family.name:
        raise ModelError(
            f"The bases are of two families, {plain.family.name} and {tuned.family.name}; a difference is only within one."
        )
    found = list(differences(plain, tuned, conv))
    if not found:
        raise ModelError("The two bases do not differ in any layer that an adapter reaches.")
    modules, kept = [], []
    for done, (component, name, delta) in enumerate(found):
        progress(done, len(found))
        left, sizes, right = torch.linalg.svd(delta.flatten(1), full_matrices=False)
        own, share = choose_rank(sizes, rank, energy)
        root = sizes[:own].sqrt()
        modules.append(
            as_module(
                component,
                name,
                left[:, :own] * root,
                (root[:, None] * right[:own]).reshape(own, *delta.shape[1:]),
            )
        )
        kept.append(Kept(component, name, own, share, float(sizes.square().sum())))
    progress(len(found), len(found))
    return modules, kept


def differences(
    plain: LoadedBase, tuned: LoadedBase, conv: bool
) -> Iterator[tuple[str, str, Tensor]]:
    """(component, path, tuned minus plain) where they differ, float64, in what may have an adapter."""
    family = plain.family
    for component in (family.denoiser_name, *family.trainable_text_encoders(plain.pipe)):
        whole, other = plain.components[component], tuned.components[component]
        for name, layer in whole.named_modules():
            if isinstance(layer, nn.Linear) or (conv and isinstance(layer, nn.Conv2d)):
                weight = other.get_submodule(name).weight
                if weight.shape != layer.weight.shape:
                    raise ModelError(
                        f"The bases differ in size at {component}.{name}; they are no two editions of one model."
                    )
                delta = (weight.double() - layer.weight.double()).detach()
                if delta.any():
                    yield component, name, delta

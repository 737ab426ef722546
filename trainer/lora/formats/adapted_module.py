"""The adapter of one linear layer or convolution, from a file or from the model in training."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

DOWN, UP, MID = "lora_down.weight", "lora_up.weight", "lora_mid.weight"
"""The tensors of a LoRA in kohya's files. The literature calls the first two A and B."""


@dataclass(frozen=True)
class AdaptedModule:
    """The adapter of one layer, of any kind.

    The tensors have the names and shapes of LyCORIS (Yeh et al. 2023, arXiv:2309.14859). kohya
    files append these names to the key of the module.

    lora: lora_down.weight [r, in] and lora_up.weight [out, r]. For a convolution [r, in, kh, kw]
        and [out, r, 1, 1], or in Tucker's form [r, in, 1, 1], lora_mid.weight [r, r, kh, kw]
        and [out, r, 1, 1].
    dora: the tensors of lora and dora_scale [out, 1, ...], the norm of each output's weights
        (Liu et al. 2024, arXiv:2402.09353).
    loha: hada_w1_a [out, r], hada_w1_b [r, in], hada_w2_a, hada_w2_b. With hada_t1 and hada_t2
        [r, r, kh, kw] the two "a" tensors are [r, out].
    lokr: lokr_w1 or lokr_w1_a @ lokr_w1_b, and lokr_w2 or lokr_w2_a @ lokr_w2_b. lokr_t2 is
        like hada_t2.

    LyCORIS also writes LoHa and LoKr with a dora_scale.
    """

    component: str
    """Name of the component in the pipeline: "unet", "text_encoder", ..."""
    name: str
    """Path of the module inside the component."""
    kind: str
    """"lora", "dora", "loha" or "lokr"."""
    tensors: dict[str, Tensor]
    scale: float
    """Factor of the product of the tensors: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""

    @property
    def rank(self) -> int | None:
        """The rank, or None for a LoKr with two full factors."""
        for name in (DOWN, "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
            if name in self.tensors:
                return int(self.tensors[name].shape[0])
        return None

    @property
    def is_plain_lora(self) -> bool:
        """Whether the adapter is a pair A and B and nothing else."""
        return set(self.tensors) == {DOWN, UP}

    @property
    def delta(self) -> Tensor:
        """delta W in the dtype of the tensors and the shape of the weight.

        For a convolution it may be flat, [out, in * kh * kw]. For a DoRA it is the change before
        the result is scaled to the learned norms.
        """
        return self.scale * PRODUCTS[self.kind](self.tensors)

    def change(self, weight: Tensor) -> Tensor:
        """Returns what the adapter adds to a weight at strength 1, in the weight's shape.

        The result has the dtype of the adapter's tensors.
        """
        delta = self.delta.reshape(weight.shape)
        if "dora_scale" not in self.tensors:
            return delta
        weight = weight.to(delta.dtype)
        changed, magnitude = weight + delta, self.tensors["dora_scale"]
        # The paper has one norm per output channel. LyCORIS also writes one per input, [1, in].
        axes = list(range(1, changed.dim()))
        if magnitude.dim() != 1:
            axes = [n for n in range(changed.dim()) if magnitude.dim() and magnitude.shape[n] == 1]
        norm = torch.linalg.vector_norm(changed, dim=axes, keepdim=True)
        return changed * (magnitude.reshape(norm.shape) / norm) - weight

    def to(self, target: torch.dtype | str) -> "AdaptedModule":
        """Returns a copy in another dtype or on another device ("meta": shapes only)."""
        tensors = {name: tensor.to(target) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors)


def common_alpha(modules: Iterable[AdaptedModule]) -> float:
    """Returns the most frequent alpha of the modules, or 1 if none of them has a rank."""
    alphas: Counter[float] = Counter()
    for module in modules:
        if module.rank and module.scale > 0:
            alphas[round(module.scale * module.rank, 6)] += 1
    return alphas.most_common(1)[0][0] if alphas else 1.0


def kind_of(tensor_names: Iterable[str]) -> str:
    """Returns the kind of an adapter with these tensors."""
    kinds = {"hada_w1_a": "loha", "lokr_w1": "lokr", "lokr_w1_a": "lokr", "dora_scale": "dora"}
    return next((kind for name, kind in kinds.items() if name in tensor_names), "lora")


def _lora(tensors: dict[str, Tensor]) -> Tensor:
    down, up = tensors[DOWN], tensors[UP]
    if MID in tensors:
        return _tucker(tensors[MID], up.flatten(1).T, down.flatten(1))
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def _loha(tensors: dict[str, Tensor]) -> Tensor:
    return _loha_factor(tensors, 1) * _loha_factor(tensors, 2)


def _loha_factor(tensors: dict[str, Tensor], number: int) -> Tensor:
    a, b = tensors[f"hada_w{number}_a"], tensors[f"hada_w{number}_b"]
    core = tensors.get(f"hada_t{number}")
    return a @ b if core is None else _tucker(core, a, b)


def _lokr(tensors: dict[str, Tensor]) -> Tensor:
    if "lokr_w1" in tensors:
        first = tensors["lokr_w1"]
    else:
        first = tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    if "lokr_w2" in tensors:
        second = tensors["lokr_w2"]
    elif "lokr_t2" in tensors:
        second = _tucker(tensors["lokr_t2"], tensors["lokr_w2_a"], tensors["lokr_w2_b"])
    else:
        second = tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
    # The first factor has no kernel: it gets axes of length 1 for the kernel of the second.
    return torch.kron(first.reshape(*first.shape, *[1] * (second.dim() - 2)), second)


def _tucker(core: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """core [r, r, kh, kw], outputs [r, out], inputs [r, in] -> [out, in, kh, kw]."""
    return torch.einsum("ijkl,ip,jq->pqkl", core, outputs, inputs)


PRODUCTS: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "lora": _lora,
    "dora": _lora,
    "loha": _loha,
    "lokr": _lokr,
}
"""delta W / scale by the kind of the adapter."""


def decompose(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the singular value decomposition of up @ down: [out, r], [r] and [r, inputs].

    It decomposes the small product of the triangles of two QR decompositions, never the whole
    matrix.
    """
    left, first = torch.linalg.qr(up)
    right, second = torch.linalg.qr(down.flatten(1).T)
    inner_left, values, inner_right = torch.linalg.svd(first @ second.T, full_matrices=False)
    return left @ inner_left, values, inner_right @ right.T

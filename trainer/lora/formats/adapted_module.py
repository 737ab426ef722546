"""One projection with its adapter, of whatever kind and wherever it comes from: the model in training or a file."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class AdaptedModule:
    """The tensors have the names and shapes of LyCORIS (Yeh et al. 2023, arXiv:2309.14859), which kohya files have behind the module's key.

    lora: lora_down.weight [r, in] and lora_up.weight [out, r]; for a convolution [r, in, kh, kw] and [out, r, 1, 1], or Tucker's
    [r, in, 1, 1], lora_mid.weight [r, r, kh, kw] and [out, r, 1, 1].
    dora: the same and dora_scale [out, 1, ...], the length of each output's weights (Liu et al. 2024, arXiv:2402.09353).
    loha: hada_w1_a [out, r], hada_w1_b [r, in], hada_w2_a, hada_w2_b; with hada_t1, hada_t2 [r, r, kh, kw] the a's are [r, out].
    lokr: lokr_w1 or lokr_w1_a @ lokr_w1_b, and lokr_w2 or lokr_w2_a @ lokr_w2_b (with lokr_t2 as above).
    LyCORIS also writes LoHa and LoKr with a dora_scale.
    """

    component: str
    """"unet", "text_encoder", ..."""
    name: str
    """Its path inside the component."""
    kind: str
    """"lora", "dora", "loha" or "lokr"."""
    tensors: dict[str, Tensor]
    scale: float
    """What the product of the tensors is multiplied by: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""

    @property
    def rank(self) -> int | None:
        """None where nothing is low-rank: a LoKr of two whole factors."""
        for name, axis in (
            ("lora_down.weight", 0),
            ("hada_w1_b", 0),
            ("lokr_w2_b", 0),
            ("lokr_w1_b", 0),
        ):
            if name in self.tensors:
                return self.tensors[name].shape[axis]
        return None

    @property
    def delta(self) -> Tensor:
        """delta W in the shape of the weight, in the precision of the tensors; of a DoRA that of its direction.

        That of a convolution may be flat, [out, in * kh * kw].
        """
        return self.scale * PRODUCTS[self.kind](self.tensors)

    def change(self, weight: Tensor) -> Tensor:
        """What is added to this weight at strength 1, in its shape, in the precision of the tensors."""
        delta = self.delta.reshape(weight.shape)
        if "dora_scale" not in self.tensors:
            return delta
        weight = weight.to(delta.dtype)
        moved, magnitude = weight + delta, self.tensors["dora_scale"]
        # By output channel, as in the paper; LyCORIS also knows magnitudes by input, [1, in].
        axes = [
            axis
            for axis in range(moved.dim())
            if magnitude.dim() == 1 and axis or magnitude.dim() > 1 and magnitude.shape[axis] == 1
        ]
        length = torch.linalg.vector_norm(moved, dim=axes, keepdim=True)
        return moved * (magnitude.reshape(length.shape) / length) - weight

    def to(self, place: torch.dtype | str) -> "AdaptedModule":
        """The same in another precision, or on another device ("meta": shapes alone)."""
        return replace(
            self, tensors={name: tensor.to(place) for name, tensor in self.tensors.items()}
        )


def common_alpha(modules: Iterable[AdaptedModule]) -> float:
    """The alpha that most modules have."""
    alphas = Counter(
        round(module.scale * module.rank, 6)
        for module in modules
        if module.rank and module.scale > 0
    )
    return alphas.most_common(1)[0][0] if alphas else 1.0


def kind_of(tensors: Iterable[str]) -> str:
    """Told by the names of its tensors."""
    marks = {"hada_w1_a": "loha", "lokr_w1": "lokr", "lokr_w1_a": "lokr", "dora_scale": "dora"}
    return next((kind for mark, kind in marks.items() if mark in tensors), "lora")


def _lora(tensors: dict[str, Tensor]) -> Tensor:
    down, up, mid = (
        tensors["lora_down.weight"],
        tensors["lora_up.weight"],
        tensors.get("lora_mid.weight"),
    )
    if mid is not None:
        return _tucker(mid, up.flatten(1).T, down.flatten(1))
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def _loha(tensors: dict[str, Tensor]) -> Tensor:
    first, second = (
        _tucker(tensors[f"hada_t{n}"], tensors[f"hada_w{n}_a"], tensors[f"hada_w{n}_b"])
        if f"hada_t{n}" in tensors
        else tensors[f"hada_w{n}_a"] @ tensors[f"hada_w{n}_b"]
        for n in (1, 2)
    )
    return first * second


def _lokr(tensors: dict[str, Tensor]) -> Tensor:
    first = (
        tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    )
    if "lokr_w2" in tensors:
        second = tensors["lokr_w2"]
    elif "lokr_t2" in tensors:
        second = _tucker(tensors["lokr_t2"], tensors["lokr_w2_a"], tensors["lokr_w2_b"])
    else:
        second = tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
    return torch.kron(first.reshape(*first.shape, *[1] * (second.dim() - 2)), second)


def _tucker(core: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """core [r, r, kh, kw], outputs [r, out], inputs [r, in] -> [out, in, kh, kw]."""
    return torch.einsum("ijkl,ip,jq->pqkl", core, outputs, inputs)


PRODUCTS = {"lora": _lora, "dora": _lora, "loha": _loha, "lokr": _lokr}


def decompose(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors and values of up @ down, by way of the small product of their triangles: [out, r], [r], [r, inputs]."""
    left, first = torch.linalg.qr(up)
    right, second = torch.linalg.qr(down.flatten(1).T)
    inner_left, sizes, inner_right = torch.linalg.svd(first @ second.T, full_matrices=False)
    return left @ inner_left, sizes, inner_right @ right.T

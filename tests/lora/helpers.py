"""Small adapters for the tests of this folder."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.bases import predict
from trainer import config
from trainer.families import LoadedBase
from trainer.lora import inject
from trainer.lora.formats.adapted_module import AdaptedModule
from trainer.lora.formats.reader import read_adapter

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
TEXT = "encoder.layers.1.self_attn.out_proj"
QUERY_KEY = f"lora_unet_{QUERY.replace('.', '_')}"

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3, "alpha": 5.0},
    "rslora": {"kind": "rslora", "rank": 4, "alpha": 6.0},
    "varying": {
        "rank": 3,
        "alpha": 5.0,
        "targets": "linear+conv",
        "conv_rank": 2,
        "ranks": "mid_block=5, attn2=1",
        "alphas": "mid_block=2",
    },
    "dora": {"kind": "dora", "rank": 2, "alpha": 3.0, "targets": "linear+conv"},
    "loha": {"kind": "loha", "rank": 2, "alpha": 3.0, "targets": "linear+conv"},
    "lokr": {"kind": "lokr", "rank": 2, "alpha": 3.0, "targets": "linear+conv", "lokr_factor": 4},
}
"""Settings of one adapter of each kind, and of a LoRA whose ranks and alphas vary."""


def random_pair(
    rank: int = 2, outputs: int = 16, inputs: int = 16, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Returns A [rank, inputs] and B [outputs, rank]."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rank, inputs, generator=draw), torch.randn(outputs, rank, generator=draw)


def lora(
    name: str, down: Tensor, up: Tensor, scale: float = 1.0, component: str = "unet"
) -> AdaptedModule:
    tensors = {"lora_down.weight": down, "lora_up.weight": up}
    return AdaptedModule(component, name, "lora", tensors, scale)


def kohya_tensors(down: Tensor, up: Tensor, alpha: float | None = None, key: str = QUERY_KEY):
    """Returns the tensors of one module in a kohya file."""
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
    return tensors if alpha is None else tensors | {f"{key}.alpha": torch.tensor(alpha)}


def peft_tensors(down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """Returns the tensors of one module in a PEFT folder."""
    key = f"base_model.model.{QUERY}"
    return {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}


def only_module(path: Path) -> AdaptedModule:
    (module,) = read_adapter(path).modules
    return module


def with_random_adapter(
    base: LoadedBase, kind: str, scale: float = 0.15
) -> tuple[Tensor, list[AdaptedModule]]:
    """Puts a random adapter on every component, as if it had been trained.

    Returns what the base then predicts, and the modules of the adapter.
    """
    draw = torch.Generator().manual_seed(3)
    components = {
        base.family.denoiser_name: base.denoiser,
        **base.family.trainable_text_encoders(base.pipe),
    }
    for name, component in components.items():
        inject.inject(component, name, config.Adapter(**ADAPTERS[kind]), seed=1)
        for key, parameter in inject.trainable(component).items():
            if "magnitude" in key:
                parameter.data *= 1 + 0.1 * torch.rand(parameter.shape, generator=draw)
            else:
                nn.init.normal_(parameter, std=scale, generator=draw)
    return predict(base.family, base.pipe), list(inject.adapted_modules(components))


def delta_in_float64(module: AdaptedModule) -> Tensor:
    """Returns scale * B A of a LoRA, computed apart from the code under test."""
    tensors = {leaf: tensor.double() for leaf, tensor in module.tensors.items()}
    down = tensors["lora_down.weight"]
    delta = module.scale * tensors["lora_up.weight"].flatten(1) @ down.flatten(1)
    return delta.reshape(-1, *down.shape[1:])

"""Optimisers and learning-rate schedules, by name; and what an optimiser remembers, as plain data."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import RunConfig, optimizer_arguments
from trainer.errors import ConfigError, StateError

Maker = Callable[..., torch.optim.Optimizer]


def _adamw() -> Maker:
    """In one kernel for all weights on CUDA: an adapter has hundreds of small ones."""
    return (
        partial(torch.optim.AdamW, fused=True)
        if torch.cuda.is_available()
        else partial(torch.optim.AdamW, foreach=True)
    )


def _adamw8bit() -> Maker:
    if not torch.cuda.is_available():
        raise ImportError("it needs an NVIDIA GPU")
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit


def _adafactor() -> Maker:
    """With the given learning rate: relative to the size of the weights, as its paper has it, B = 0 would never leave zero."""
    from transformers.optimization import Adafactor

    return partial(Adafactor, scale_parameter=False, relative_step=False, warmup_init=False)


def _collection(name: str) -> Maker:
    """From the pytorch-optimizer package (github.com/kozistr/pytorch_optimizer)."""
    from pytorch_optimizer import get_supported_optimizers, load_optimizer

    names = [n for n in get_supported_optimizers() if "_" not in n]
    if name.lower() not in names:  # also keeps out its prefixes, which load other packages
        near = difflib.get_close_matches(name.lower(), names) or names
        raise ConfigError(
            f"training.optimizer_name: the collection has no {name!r}; it has {', '.join(near)}."
        )
    return load_optimizer(name)


# Each imports its library only when it is chosen.
OPTIMIZERS: dict[str, Callable[[RunConfig], Maker]] = {
    "adamw": lambda run: _adamw(),
    "adamw8bit": lambda run: _adamw8bit(),
    "adafactor": lambda run: _adafactor(),
    "lion": lambda run: _collection("lion"),
    "prodigy": lambda run: _collection("prodigy"),
    "schedule_free_adamw": lambda run: _collection("schedulefreeadamw"),
    "collection": lambda run: _collection(run.training.optimizer_name),
}


def build_optimizer(
    parameters: Iterable[tuple[list[nn.Parameter], float]], run: RunConfig
) -> torch.optim.Optimizer:
    """One group for each (parameters, learning rate); groups with a rate of 0 are left out.

    Raises ConfigError for arguments that the optimiser does not take, ImportError where it cannot work on this machine.
    """
    groups = [
        {"params": group, "lr": rate, "initial_lr": rate}
        for group, rate in parameters
        if rate > 0 and group
    ]
    maker, arguments = (
        OPTIMIZERS[run.training.optimizer](run),
        optimizer_arguments(run.training.optimizer_args),
    )
    taken = [
        p.name
        for p in inspect.signature(maker).parameters.values()
        if p.kind is not p.VAR_KEYWORD and p.name != "params"
    ]
    if unknown := [name for name in arguments if name not in taken]:
        raise ConfigError(
            f"training.optimizer_args: {run.training.optimizer} takes no {', '.join(unknown)}; it takes {', '.join(taken)}."
        )
    if "weight_decay" in taken:
        arguments["weight_decay"] = run.training.weight_decay
    try:
        return maker(
            groups, **({"lr": groups[0]["lr"]} if groups and "lr" in taken else {}), **arguments
        )
    except (
        ValueError,
        TypeError,
        AttributeError,
        AssertionError,
        NotImplementedError,
        ImportError,
    ) as error:
        name = run.training.optimizer_name or run.training.optimizer
        raise ConfigError(
            f"training.optimizer: {name} cannot be made from these settings ({str(error)[:200]})."
        ) from None


def try_optimizer(run: RunConfig, device: torch.device) -> None:
    """Takes steps with a small dummy of an adapter, and one of them again from what would be stored.

    Raises ConfigError where the optimiser cannot train an adapter or forgets something, ImportError where its library is not usable.
    """
    name = run.training.optimizer_name or run.training.optimizer
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        weights, others = _dummy(device), _dummy(device)
        optimizer, interrupted = (build_optimizer([(w, 1e-3)], run) for w in (weights, others))
        try:
            for step in (1, 2):
                _dummy_step(optimizer, weights, step)
            _dummy_step(interrupted, others, 1)
            resumed = build_optimizer([(others, 1e-3)], run)
            restore_optimizer(resumed, *optimizer_state(interrupted))
            _dummy_step(resumed, others, 2)
        except (
            Exception
        ) as error:  # whatever a library of so many optimisers may raise, it cannot be used
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise ConfigError(
                f"training.optimizer: {name} cannot train an adapter ({reason}); choose another."
            ) from error
        if not all(torch.isfinite(w).all() for w in weights):
            raise ConfigError(
                f"training.optimizer: {name} gives numbers that are not finite in its first steps; choose another."
            )
        if not all(
            torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(weights, others, strict=True)
        ):
            raise ConfigError(
                f"training.optimizer: a training with {name} could not be resumed after an interruption; choose another."
            )


def _dummy(device: torch.device) -> list[nn.Parameter]:
    """A and B of a LoRA, of 4096 weights each: from there on bitsandbytes uses 8 bits."""
    draws = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(w.to(device))
        for w in (0.1 * torch.randn(8, 512, generator=draws), torch.zeros(512, 8))
    ]


def _dummy_step(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], step: int) -> None:
    draws = torch.Generator().manual_seed(step)
    for weight in weights:
        weight.grad = 0.01 * torch.randn(weight.shape, generator=draws).to(weight.device)
    torch.manual_seed(step)
    optimizer.step()


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the optimiser remembers: its tensors by place ("3.exp_avg" for the fourth parameter), and the rest as JSON."""
    tensors: dict[str, Tensor] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    memory = {
        str(index): _plain(dict(optimizer.state[p]), str(index), tensors)
        for index, p in enumerate(parameters)
        if p in optimizer.state
    }
    groups = [
        _plain(
            {name: value for name, value in group.items() if name != "params"},
            f"group{number}",
            tensors,
        )
        for number, group in enumerate(optimizer.param_groups)
    ]
    return tensors, {"class": type(optimizer).__name__, "memory": memory, "groups": groups}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]
) -> None:
    """Puts back what `optimizer_state` gave, to the bit: torch's own loading would turn counters and bytes into floats."""
    if rest["class"] != type(optimizer).__name__:
        raise StateError(
            f"The run was trained with {rest['class']}, but here and now only {type(optimizer).__name__} can be used. "
            "Resume it where it was started, or start a new run."
        )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device
    optimizer.state.clear()  # the state of step 0 has no memory to take the place of what is there
    for index, entry in rest["memory"].items():
        optimizer.state[parameters[int(index)]] = _restored(entry, tensors, device)
    for group, entry in zip(optimizer.param_groups, rest["groups"], strict=True):
        stored = _restored(entry, tensors, device)
        for counter in group.keys() - stored.keys() - optimizer.defaults.keys() - {"params"}:
            del group[counter]
        group.update(stored)


def _plain(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for a value; tensors in it are put into `tensors` and named by their place."""
    if isinstance(value, Tensor):
        tensors[place] = value.detach().cpu().contiguous().clone()
        return {"tensor": place, "on_cpu": value.device.type == "cpu"}
    if isinstance(value, Mapping):
        return {
            "items": [
                [key, _plain(inner, f"{place}.{key}", tensors)] for key, inner in value.items()
            ]
        }
    if isinstance(value, (list, tuple)):
        return {
            "tuple" if isinstance(value, tuple) else "list": [
                _plain(inner, f"{place}.{i}", tensors) for i, inner in enumerate(value)
            ]
        }
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise StateError(f"the optimiser remembers a {type(value).__name__}, which cannot be stored")


def _restored(value: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    if not isinstance(value, dict):
        return value
    (kind, content), *_ = value.items()
    if kind == "tensor":
        return tensors[content].clone().to("cpu" if value["on_cpu"] else device)
    if kind == "items":
        return {key: _restored(inner, tensors, device) for key, inner in content}
    return {"list": list, "tuple": tuple}[kind](
        _restored(inner, tensors, device) for inner in content
    )

"""Optimisers by name, and what an optimiser remembers as plain data."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from trainer.config import RunConfig, optimizer_arguments
from trainer.errors import ConfigError, StateError

OptimizerClass = Callable[..., torch.optim.Optimizer]

CONSTRUCTOR_ERRORS = (
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    NotImplementedError,
    ImportError,
)
"""What the constructors of the pytorch-optimizer package raise for unsuitable arguments."""


def _adamw() -> OptimizerClass:
    """On CUDA one kernel updates all weights, because an adapter has hundreds of small ones."""
    if torch.cuda.is_available():
        return partial(torch.optim.AdamW, fused=True)
    return partial(torch.optim.AdamW, foreach=True)


def _adamw8bit() -> OptimizerClass:
    if not torch.cuda.is_available():
        raise ImportError("it needs an NVIDIA GPU")
    import bitsandbytes

    optimizer_class: OptimizerClass = bitsandbytes.optim.AdamW8bit
    return optimizer_class


def _adafactor() -> OptimizerClass:
    """With an absolute learning rate: relative to the size of the weights, B = 0 would stay 0."""
    from transformers.optimization import Adafactor

    return partial(Adafactor, scale_parameter=False, relative_step=False, warmup_init=False)


def _collection(name: str) -> OptimizerClass:
    """Returns an optimiser of the pytorch-optimizer package (github.com/kozistr/pytorch_optimizer).

    Raises ConfigError if the package has no optimiser of this name.
    """
    from pytorch_optimizer import get_supported_optimizers, load_optimizer

    # Names with an underscore are prefixes that load other packages, so they are not accepted.
    names = [each for each in get_supported_optimizers() if "_" not in each]
    if name.lower() not in names:
        near = difflib.get_close_matches(name.lower(), names) or names
        raise ConfigError(
            f"training.optimizer_name: the collection has no {name!r}; it has {', '.join(near)}."
        )
    optimizer_class: OptimizerClass = load_optimizer(name)
    return optimizer_class


# Each library is imported only when its optimiser is chosen.
OPTIMIZERS: dict[str, Callable[[RunConfig], OptimizerClass]] = {
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
    """Returns an optimiser with one group for each (parameters, learning rate) above 0.

    Raises ConfigError for arguments that the optimiser does not take, and ImportError if it does
    not work on this machine.
    """
    groups = [
        {"params": group, "lr": rate, "initial_lr": rate}
        for group, rate in parameters
        if rate > 0 and group
    ]
    optimizer_class = OPTIMIZERS[run.training.optimizer](run)
    accepted = _argument_names(optimizer_class)
    arguments = optimizer_arguments(run.training.optimizer_args)
    unknown = [name for name in arguments if name not in accepted]
    if unknown:
        raise ConfigError(
            f"training.optimizer_args: {run.training.optimizer} takes no {', '.join(unknown)}; "
            f"it takes {', '.join(accepted)}."
        )
    if "weight_decay" in accepted:
        arguments["weight_decay"] = run.training.weight_decay
    if groups and "lr" in accepted:
        arguments["lr"] = groups[0]["lr"]
    try:
        return optimizer_class(groups, **arguments)
    except CONSTRUCTOR_ERRORS as error:
        raise ConfigError(
            f"training.optimizer: {_shown_name(run)} cannot be made from these settings "
            f"({str(error)[:200]})."
        ) from None


def _argument_names(optimizer_class: OptimizerClass) -> list[str]:
    parameters = inspect.signature(optimizer_class).parameters.values()
    return [
        parameter.name
        for parameter in parameters
        if parameter.kind is not parameter.VAR_KEYWORD and parameter.name != "params"
    ]


def _shown_name(run: RunConfig) -> str:
    return run.training.optimizer_name or run.training.optimizer


def try_optimizer(run: RunConfig, device: torch.device) -> None:
    """Trains a small dummy adapter for two steps, once without and once with an interruption.

    Raises ConfigError if the optimiser cannot train an adapter or cannot be resumed, and
    ImportError if its library does not work.
    """
    name = _shown_name(run)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        whole, resumed = _dummy_adapter(device), _dummy_adapter(device)
        first, second = (build_optimizer([(weights, 1e-3)], run) for weights in (whole, resumed))
        try:
            _dummy_step(first, whole, 1)
            _dummy_step(first, whole, 2)
            _dummy_step(second, resumed, 1)
            third = build_optimizer([(resumed, 1e-3)], run)
            restore_optimizer(third, *optimizer_state(second))
            _dummy_step(third, resumed, 2)
        except Exception as error:  # the libraries of so many optimisers may raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise ConfigError(
                f"training.optimizer: {name} cannot train an adapter ({reason}); choose another."
            ) from error
        if not all(torch.isfinite(weights).all() for weights in whole):
            raise ConfigError(
                f"training.optimizer: {name} gives numbers that are not finite in its first steps; "
                "choose another."
            )
        pairs = zip(whole, resumed, strict=True)
        if not all(torch.allclose(one, other, rtol=1e-5, atol=1e-8) for one, other in pairs):
            raise ConfigError(
                f"training.optimizer: a training with {name} could not be resumed after an "
                "interruption; choose another."
            )


def _dummy_adapter(device: torch.device) -> list[nn.Parameter]:
    """Returns A and B of a LoRA, with 4096 weights each: bitsandbytes uses 8 bits from there on."""
    draws = torch.Generator().manual_seed(0)
    a, b = 0.1 * torch.randn(8, 512, generator=draws), torch.zeros(512, 8)
    return [nn.Parameter(a.to(device)), nn.Parameter(b.to(device))]


def _dummy_step(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], step: int) -> None:
    draws = torch.Generator().manual_seed(step)
    for weight in weights:
        weight.grad = 0.01 * torch.randn(weight.shape, generator=draws).to(weight.device)
    torch.manual_seed(step)
    optimizer.step()


# What an optimiser remembers

OptimizerRecord = TypedDict(
    "OptimizerRecord", {"class": str, "memory": dict[str, Any], "groups": list[Any]}
)
"""What an optimiser remembers as JSON, in which tensors are referred to by name."""


def optimizer_state(
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, Tensor], OptimizerRecord]:
    """Returns what the optimiser remembers: its tensors by name, and everything else as JSON.

    The name of a tensor is its path, such as "3.exp_avg" for the fourth parameter.
    """
    tensors: dict[str, Tensor] = {}
    memory = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        if parameter in optimizer.state:
            entries = dict(optimizer.state[parameter])
            memory[str(index)] = _to_json(entries, str(index), tensors)
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        options = {name: value for name, value in group.items() if name != "params"}
        groups.append(_to_json(options, f"group{number}", tensors))
    return tensors, {"class": type(optimizer).__name__, "memory": memory, "groups": groups}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], record: OptimizerRecord
) -> None:
    """Restores what `optimizer_state` returned, to the bit.

    torch's own `load_state_dict` would turn counters and bytes into floats. Raises StateError if
    the record belongs to another optimiser.
    """
    name = type(optimizer).__name__
    if record["class"] != name:
        raise StateError(
            f"The run was trained with {record['class']}, but on this machine only {name} can be "
            "used. Resume it on the machine on which it was started, or start a new run."
        )
    parameters = _parameters(optimizer)
    device = parameters[0].device
    # A checkpoint of step 0 has no memory that could replace what is there.
    optimizer.state.clear()
    for index, entry in record["memory"].items():
        optimizer.state[parameters[int(index)]] = _from_json(entry, tensors, device)
    for group, entry in zip(optimizer.param_groups, record["groups"], strict=True):
        options = _from_json(entry, tensors, device)
        # Counters that an optimiser adds to its groups during the training.
        for added in group.keys() - options.keys() - optimizer.defaults.keys() - {"params"}:
            del group[added]
        group.update(options)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _to_json(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Returns a value as JSON; its tensors are put into `tensors` under their path."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {"tensor": path, "on_cpu": value.device.type == "cpu"}
    if isinstance(value, Mapping):
        items = [[key, _to_json(inner, f"{path}.{key}", tensors)] for key, inner in value.items()]
        return {"items": items}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        elements = enumerate(value)
        return {kind: [_to_json(inner, f"{path}.{index}", tensors) for index, inner in elements]}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise StateError(f"the optimiser remembers a {type(value).__name__}, which cannot be stored")


def _from_json(value: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """Reverses `_to_json`; tensors that were on the device go to the device."""
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()))
    if kind == "tensor":
        return tensors[content].clone().to("cpu" if value["on_cpu"] else device)
    if kind == "items":
        return {key: _from_json(inner, tensors, device) for key, inner in content}
    elements = (_from_json(inner, tensors, device) for inner in content)
    return tuple(elements) if kind == "tuple" else list(elements)

"""What resuming needs, saved whole, checked by hash, and never as pickle.

    state/000120/  adapter.safetensors  optimizer.safetensors  average.safetensors  state.json

Random draws are functions of the step, so no generator state is kept. The last two states stay, and
the newest one that is whole is taken.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from trainer.errors import StateError
from trainer.runs.atomic_files import atomic_folder, check_room

VERSION = 2
KEPT = 2
TENSOR_FILES = ("adapter", "optimizer", "average")


@dataclass(frozen=True)
class State:
    step: int
    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    average: dict[str, Tensor]
    """Of the adapter over the steps; empty where none is asked for."""
    facts: dict[str, Any]
    """What must be the same for the run to go on, and what is no tensor: {"config": fingerprint, "dataset": {...}, "started": ...}."""


def save_state(folder: Path, state: State) -> None:
    """Writes state/<step>/ and then drops all but the newest two, and those ahead of it: the run went back behind them."""
    root = folder / "state"
    root.mkdir(exist_ok=True)
    contents = {f"{part}.safetensors": save_tensors(getattr(state, part)) for part in TENSOR_FILES}
    check_room(root, sum(map(len, contents.values())) + 2**16, f"the state of step {state.step}")
    with atomic_folder(root / f"{state.step:06d}") as temporary:
        for name, content in contents.items():
            (temporary / name).write_bytes(content)
        document = {
            "version": VERSION,
            "step": state.step,
            "facts": state.facts,
            "sha256": {
                name: hashlib.sha256(content).hexdigest() for name, content in contents.items()
            },
        }
        (temporary / "state.json").write_text(
            json.dumps(document | {"self": _digest(document)}), encoding="utf-8"
        )
    folders = _folders(folder)
    ahead = [path for path in folders if int(path.name) > state.step]
    for old in [*ahead, *folders[len(ahead) + KEPT :]]:
        rmtree(old)


def load_state(
    folder: Path, wanted: Callable[[State], bool] = lambda state: True
) -> tuple[State | None, list[str]]:
    """The newest whole state that is wanted (None without one), and a sentence for each damaged one that was passed over."""
    passed_over: list[str] = []
    for path in _folders(folder):
        try:
            state = _read(path)
            if wanted(state):
                return state, passed_over
        except (OSError, ValueError, KeyError, TypeError, StateError) as error:
            passed_over.append(
                f"The state of step {int(path.name)} is damaged ({str(error)[:100]}); an older one is used."
            )
    return None, passed_over


def _folders(folder: Path) -> list[Path]:
    """State folders, the furthest step first."""
    root = folder / "state"
    return (
        sorted(
            (path for path in root.iterdir() if path.name.isdigit()),
            key=lambda path: int(path.name),
            reverse=True,
        )
        if root.is_dir()
        else []
    )


def _read(path: Path) -> State:
    document = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if document.pop("self") != _digest(document):
        raise StateError("state.json is not what was written")
    if document["version"] != VERSION:
        raise StateError(f"it was written by another version ({document['version']})")
    contents = {
        f"{part}.safetensors": (path / f"{part}.safetensors").read_bytes() for part in TENSOR_FILES
    }
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != document["sha256"][name]:
            raise StateError(f"{name} is not what was written")
    adapter, optimizer, average = map(load_tensors, contents.values())
    return State(document["step"], adapter, optimizer, average, document["facts"])


def _digest(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def restore_parameters(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copies into the parameters that are there: new ones would be unknown to the optimiser. Raises StateError on any mismatch."""
    if set(parameters) != set(tensors):
        raise StateError("The state belongs to an adapter with other modules; start a new run.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def check_unchanged(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises StateError that says what differs between the run's first start and now."""
    if before["config"] != now["config"]:
        raise StateError(
            "The settings in run.toml were changed since the run started, so "
            "it cannot go on as the same training. Start a new run with them."
        )
    if before["dataset"] != now["dataset"]:
        old, new = before["dataset"], now["dataset"]
        changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        raise StateError(
            f"The dataset changed since the run started ({len(changed)} pictures "
            f"or captions, such as {changed[0]}). Put it back, or start a new run."
        )

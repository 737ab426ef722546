"""Checkpoints: what resuming a run needs, saved whole, checked by hash, and never as pickle.

    state/000120/  adapter.safetensors  optimizer.safetensors  average.safetensors  state.json

Every random draw is a function of the step, so no generator state is saved. The newest two
checkpoints stay on disk, and a run resumes from the newest one that is whole.
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
from trainer.training.optimizers import OptimizerRecord

VERSION = 2
MAX_CHECKPOINTS = 2
TENSOR_FILES = ("adapter", "optimizer", "average")
PROGRESS = ("elapsed", "loss_scale", "lr_scale", "rollbacks", "bad_steps", "averaged_steps")
STATE_JSON_BYTES = 2**16  # room for state.json, of which the optimiser's record is the largest part


@dataclass(frozen=True)
class RunIdentity:
    """What must not change during a run, and when the run started."""

    config: str
    """Fingerprint of the settings."""
    dataset: Mapping[str, str]
    """Fingerprint of each image at each resolution, by name."""
    started: float
    """Seconds since the epoch."""


@dataclass
class TrainerState:
    """The progress of a run that is neither a tensor nor the step."""

    identity: RunIdentity
    elapsed: float = 0.0
    """Seconds of training so far, over all restarts."""
    loss_scale: float = 2.0**16
    """Of the fp16 gradient scaler."""
    lr_scale: float = 1.0
    """Factor on the learning rate, lowered by each rollback."""
    rollbacks: int = 0
    bad_steps: int = 0
    """Skipped steps in a row: loss or gradients were not finite."""
    averaged_steps: int | None = None
    """Steps in the moving average of the weights, or None if the run has no average."""

    def to_document(self) -> dict[str, Any]:
        """Returns the state as JSON, with the keys of state.json."""
        document = {
            "config": self.identity.config,
            "dataset": dict(self.identity.dataset),
            "started": self.identity.started,
            "elapsed": self.elapsed,
            "loss_scale": self.loss_scale,
            "lr_scale": self.lr_scale,
            "rollbacks": self.rollbacks,
            "bad_steps": self.bad_steps,
        }
        if self.averaged_steps is not None:
            document["averaged_steps"] = self.averaged_steps
        return document

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "TrainerState":
        """Reads what `to_document` wrote. Raises KeyError if a required key is missing."""
        identity = RunIdentity(document["config"], document["dataset"], document["started"])
        return cls(identity, **{name: document[name] for name in PROGRESS if name in document})


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run resumes from."""

    step: int
    adapter: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    average: Mapping[str, Tensor]
    """Moving average of the adapter's weights, or empty if the run has none."""
    optimizer_record: OptimizerRecord
    """What the optimiser remembers besides tensors."""
    state: TrainerState


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes state/<step>/, then deletes all but the newest two checkpoints.

    Checkpoints of later steps are deleted too: the run was rolled back behind them. Raises
    DiskError if the disk is full.
    """
    root = folder / "state"
    root.mkdir(exist_ok=True)
    tensors = (checkpoint.adapter, checkpoint.optimizer, checkpoint.average)
    contents = {
        f"{part}.safetensors": save_tensors(dict(tensors_of_part))
        for part, tensors_of_part in zip(TENSOR_FILES, tensors, strict=True)
    }
    needed = sum(map(len, contents.values())) + STATE_JSON_BYTES
    check_room(root, needed, f"the checkpoint of step {checkpoint.step}")
    with atomic_folder(root / f"{checkpoint.step:06d}") as temporary:
        for name, content in contents.items():
            (temporary / name).write_bytes(content)
        document = {
            "version": VERSION,
            "step": checkpoint.step,
            "facts": checkpoint.state.to_document() | {"optimizer": checkpoint.optimizer_record},
            "sha256": {name: _sha256(content) for name, content in contents.items()},
        }
        document["self"] = _document_hash(document)
        (temporary / "state.json").write_text(json.dumps(document), encoding="utf-8")
    _delete_old_checkpoints(folder, checkpoint.step)


def load_checkpoint(
    folder: Path, accepts: Callable[[Checkpoint], bool] = lambda checkpoint: True
) -> tuple[Checkpoint | None, list[str]]:
    """Returns the newest whole checkpoint that is accepted, and a warning per damaged one."""
    warnings: list[str] = []
    for path in _checkpoint_folders(folder):
        try:
            checkpoint = _read(path)
            if accepts(checkpoint):
                return checkpoint, warnings
        except (OSError, ValueError, KeyError, TypeError, StateError) as error:
            warnings.append(
                f"The checkpoint of step {int(path.name)} is damaged ({str(error)[:100]}). "
                "The run looks for an older one."
            )
    return None, warnings


def _checkpoint_folders(folder: Path) -> list[Path]:
    """Returns the folders of all checkpoints, the latest step first."""
    root = folder / "state"
    if not root.is_dir():
        return []
    folders = [path for path in root.iterdir() if path.name.isdigit()]
    return sorted(folders, key=lambda path: int(path.name), reverse=True)


def _delete_old_checkpoints(folder: Path, step: int) -> None:
    folders = _checkpoint_folders(folder)
    later = [path for path in folders if int(path.name) > step]
    older = folders[len(later) + MAX_CHECKPOINTS :]
    for path in [*later, *older]:
        rmtree(path)


def _read(path: Path) -> Checkpoint:
    """Reads a checkpoint. Raises StateError if a file is not what was written."""
    document = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if document.pop("self") != _document_hash(document):
        raise StateError("state.json is not what was written")
    if document["version"] != VERSION:
        raise StateError(f"it was written by another version ({document['version']})")
    parts = []
    for part in TENSOR_FILES:
        name = f"{part}.safetensors"
        content = (path / name).read_bytes()
        if _sha256(content) != document["sha256"][name]:
            raise StateError(f"{name} is not what was written")
        parts.append(load_tensors(content))
    adapter, optimizer, average = parts
    facts = document["facts"]
    state = TrainerState.from_document(facts)
    return Checkpoint(document["step"], adapter, optimizer, average, facts["optimizer"], state)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _document_hash(document: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(document, sort_keys=True).encode())


def restore_parameters(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors into the existing parameters, which the optimiser refers to.

    Raises StateError if the names differ.
    """
    if set(parameters) != set(tensors):
        raise StateError(
            "The checkpoint belongs to an adapter with other modules; start a new run."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def check_unchanged(before: RunIdentity, now: RunIdentity) -> None:
    """Raises StateError if the settings or the dataset changed since the run started."""
    if before.config != now.config:
        raise StateError(
            "The settings in run.toml were changed since the run started, so "
            "it cannot go on as the same training. Start a new run with them."
        )
    if before.dataset != now.dataset:
        names = before.dataset.keys() | now.dataset.keys()
        changed = sorted(
            name for name in names if before.dataset.get(name) != now.dataset.get(name)
        )
        raise StateError(
            f"The dataset changed since the run started ({len(changed)} images "
            f"or captions, such as {changed[0]}). Put it back, or start a new run."
        )

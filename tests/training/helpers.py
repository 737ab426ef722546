"""What several tests of trainings share."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trainer.config import RunConfig
from trainer.runs import events, run_folder, run_status
from trainer.training.runner import run_in
from trainer.training.session import Session
from trainer.training.setup import prepare
from trainer.training.step import optimizer_step

Tensors = dict[str, torch.Tensor]


def adapter_of(folder: Path) -> Tensors:
    """Returns the tensors of the chosen adapter file of a finished run."""
    return load_file(folder / run_status.read_status(folder).finished.file)


def same(one: Tensors, other: Tensors) -> bool:
    """Returns whether two adapters have the same tensors, to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def session_of(run: RunConfig) -> Session:
    """Prepares a run in memory."""
    folder = run_folder.create(run)
    return prepare(run, folder, events.EventLog(folder / "events.jsonl"))


def events_of(folder: Path, kind: type[Any] = events.Event) -> list[Any]:
    """Returns a run's events of one kind."""
    happened = events.read_events(folder / "events.jsonl")
    return [event for event in happened if isinstance(event, kind)]


def on_step_done(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    """Calls `action` right after the event of a step is written."""
    append = events.EventLog.append

    def append_and_act(self: events.EventLog, event: events.Event) -> None:
        append(self, event)
        if isinstance(event, events.StepDone) and event.step == step:
            action()

    monkeypatch.setattr(events.EventLog, "append", append_and_act)


def poison(monkeypatch: pytest.MonkeyPatch, bad_calls: Collection[int]) -> None:
    """Turns the loss of some microbatches, counted from 1, into NaN."""
    real, calls = optimizer_step.microbatch_losses, iter(range(1, 1000))

    def poisoned(*given):
        factor = float("nan") if next(calls) in bad_calls else 1.0
        return (factor * loss for loss in real(*given))

    monkeypatch.setattr(optimizer_step, "microbatch_losses", poisoned)


def resumed_from(folder: Path) -> tuple[int, int | None]:
    """Resumes a run. Returns its exit code, and the step from which it went on."""
    log = folder / "events.jsonl"
    earlier = log.stat().st_size
    code = run_in(folder)
    lines = log.read_bytes()[earlier:].splitlines()
    started = [json.loads(line) for line in lines if b'"Started"' in line]
    return code, started[0]["step"] if started else None

"""With CUDA the host launches a step before it knows how the last one ended; here on a CPU, whose fused optimiser can do it too."""

import shutil
import traceback
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.training.test_loop import adapter_of, poison, same
from trainer.runs import events, run_folder, run_requests, run_status
from trainer.training import loop, optimizers
from trainer.training.runner import run_in
from trainer.training.step import optimizer_step


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    monkeypatch.setattr(optimizers, "_adamw", lambda: partial(torch.optim.AdamW, fused=True))


def run_ahead(monkeypatch):
    monkeypatch.setattr(
        optimizer_step,
        "runs_ahead",
        lambda session, scaler: session.optimisation.optimizer._step_supports_amp_scaling,
    )


def told(folder):
    """All that the events say of the steps, but for the seconds."""
    status = run_status.read_status(folder)
    return status.losses, status.learning_rates, status.warnings, status.validation_losses, status.step


@pytest.mark.parametrize("bad_steps", [set(), {1}, {3}, {4, 5, 6}, {7, 8}])
def test_running_ahead_gives_the_same_weights_and_events(tiny_run, monkeypatch, bad_steps):
    run = tiny_run({"training.steps": 8, "saving.saves": 1, "saving.state_every": 3})
    folders = [run_folder.create(run) for _ in range(2)]
    for folder, prepared in zip(folders, (lambda patch: None, run_ahead), strict=True):
        with monkeypatch.context() as patch:
            poison(patch, bad_steps)
            prepared(patch)
            assert run_in(folder) == 0, run_status.read_status(folder).message
    assert told(folders[0]) == told(folders[1])
    assert same(adapter_of(folders[0]), adapter_of(folders[1]))
    assert len(told(folders[0])[2]) == (3 if len(bad_steps) == 3 else len(bad_steps))


def test_running_ahead_resumes_to_the_bit(train_tiny, monkeypatch):
    run_ahead(monkeypatch)
    folder = train_tiny()
    whole = adapter_of(folder)
    shutil.rmtree(folder / "state" / "000006")
    assert run_in(folder) == 0 and same(adapter_of(folder), whole)


def test_requests_are_answered_after_all_finished_steps_are_reported(tiny_run, monkeypatch):
    """A save between the stations comes after the step it holds, and a stop loses none."""
    run_ahead(monkeypatch)
    folder = run_folder.create(
        tiny_run({"training.steps": 20, "saving.saves": 1, "saving.state_every": 20})
    )
    taking = loop.optimizer_step

    def asking(session, *given):
        done = taking(session, *given)
        if len(asked) < 4:
            asked.append(None)
        elif len(asked) == 4:
            run_requests.request(folder, "save")
            asked.append("save")
        elif run_status.read_status(folder).adapters:
            run_requests.request(folder, "stop")
        return done

    asked: list = []
    monkeypatch.setattr(loop, "optimizer_step", asking)
    run_in(folder)
    happened = [
        e
        for e in events.read_events(folder / "events.jsonl")
        if isinstance(e, events.StepDone | events.AdapterSaved)
    ]
    steps = [e.step for e in happened if isinstance(e, events.StepDone)]
    assert steps == list(range(1, len(steps) + 1)) and 5 < len(steps) < 20
    first = next(i for i, e in enumerate(happened) if isinstance(e, events.AdapterSaved))
    assert happened[first].step == happened[first - 1].step == 5


class Waits(TorchDispatchMode):
    """Where a number of a tensor is asked for, which on CUDA waits for all that was launched."""

    def __init__(self):
        super().__init__()
        self.counting, self.found = False, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.counting and function is torch.ops.aten._local_scalar_dense.default:
            self.found.append("".join(traceback.format_stack()[-8:]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes", [{}, {"training.text_encoder_learning_rate": 1e-2}, {"adapter.max_norm": 0.05}]
)
def test_a_step_never_synchronises_with_the_device(train_tiny, monkeypatch, changes):
    run_ahead(monkeypatch)
    waits, (launch, finish) = Waits(), (loop.forward_backward, loop.report_finished_steps)

    def launching(session, step, scaler):
        waits.counting = 1 < step < 6
        return launch(session, step, scaler)

    def settling(*given, **named):
        finish(*given, **named)
        waits.counting = False

    monkeypatch.setattr(loop, "forward_backward", launching)
    monkeypatch.setattr(loop, "report_finished_steps", settling)
    with waits:
        train_tiny(changes | {"saving.saves": 1, "saving.state_every": 6})
    assert not waits.found, waits.found[0]

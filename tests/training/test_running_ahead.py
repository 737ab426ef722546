"""The host launches a step before it has read the results of the last one.

That happens on CUDA. Here it happens on a CPU, whose fused optimiser can skip steps by itself too.
"""

import shutil
import traceback
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.training.helpers import adapter_of, events_of, poison, same
from trainer.runs import events, run_folder, run_requests, run_status
from trainer.training import loop, optimizers
from trainer.training.runner import STOPPED, run_in
from trainer.training.step import optimizer_step


@pytest.fixture(autouse=True)
def fused_adamw(monkeypatch):
    monkeypatch.setattr(optimizers, "_adamw", lambda: partial(torch.optim.AdamW, fused=True))


def run_ahead(monkeypatch):
    """Makes every run in this process run ahead, as on CUDA."""

    def can_skip(session, scaler):
        return session.optimisation.optimizer._step_supports_amp_scaling

    monkeypatch.setattr(optimizer_step, "runs_ahead", can_skip)


def reported(folder):
    """Returns what the events contain about the steps, except the seconds."""
    status = run_status.read_status(folder)
    return {
        "losses": status.losses,
        "learning_rates": status.learning_rates,
        "warnings": status.warnings,
        "validation_losses": status.validation_losses,
        "step": status.step,
    }


@pytest.mark.parametrize(
    ("bad_steps", "warnings"),
    [(set(), 0), ({1}, 1), ({3}, 1), ({4, 5, 6}, 3), ({7, 8}, 2)],
    ids=str,
)
def test_running_ahead_gives_the_same_weights_and_events(
    tiny_run, monkeypatch, bad_steps, warnings
):
    run = tiny_run({"training.steps": 8, "saving.saves": 1, "saving.state_every": 3})
    waiting, ahead = run_folder.create(run), run_folder.create(run)
    with monkeypatch.context() as patch:
        poison(patch, bad_steps)
        assert run_in(waiting) == 0
    with monkeypatch.context() as patch:
        poison(patch, bad_steps)
        run_ahead(patch)
        assert run_in(ahead) == 0
    assert reported(waiting) == reported(ahead)
    assert same(adapter_of(waiting), adapter_of(ahead))
    assert len(reported(waiting)["warnings"]) == warnings


def test_running_ahead_resumes_to_the_bit(train_tiny, monkeypatch):
    run_ahead(monkeypatch)
    folder = train_tiny()
    whole = adapter_of(folder)
    shutil.rmtree(folder / "state" / "000006")
    assert run_in(folder) == 0
    assert same(adapter_of(folder), whole)


def test_requests_are_answered_after_all_finished_steps_are_reported(tiny_run, monkeypatch):
    """A requested save follows the report of its step, and a stop loses no step."""
    run_ahead(monkeypatch)
    settings = {"training.steps": 20, "saving.saves": 1, "saving.state_every": 20}
    folder = run_folder.create(tiny_run(settings))
    real = loop.optimizer_step

    def requesting(session, scaler, step, *given):
        done = real(session, scaler, step, *given)
        if step == 5:
            run_requests.request(folder, "save")
        elif run_status.read_status(folder).adapters:
            run_requests.request(folder, "stop")
        return done

    monkeypatch.setattr(loop, "optimizer_step", requesting)
    assert run_in(folder) == STOPPED
    steps = [event.step for event in events_of(folder, events.StepDone)]
    assert steps == list(range(1, len(steps) + 1))
    assert 5 < len(steps) < 20
    happened = events_of(folder, events.StepDone | events.AdapterSaved)
    saved = next(i for i, event in enumerate(happened) if isinstance(event, events.AdapterSaved))
    assert happened[saved].step == happened[saved - 1].step == 5


class Synchronisations(TorchDispatchMode):
    """Records where the value of a tensor is read, which on CUDA waits for all launched work."""

    def __init__(self):
        super().__init__()
        self.is_counting = False
        self.stacks = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.is_counting and function is torch.ops.aten._local_scalar_dense.default:
            self.stacks.append("".join(traceback.format_stack()[-8:]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes", [{}, {"training.text_encoder_learning_rate": 1e-2}, {"adapter.max_norm": 0.05}]
)
def test_a_step_never_synchronises_with_the_device(train_tiny, monkeypatch, changes):
    run_ahead(monkeypatch)
    forward_backward, report = loop.forward_backward, loop.report_finished_steps
    synchronisations = Synchronisations()
    counted = []

    def starting(session, step, scaler):
        if 1 < step < 6:  # the first step checks that gradients arrive, the last one is saved
            synchronisations.is_counting = True
            counted.append(step)
        return forward_backward(session, step, scaler)

    def ending(*given, **named):
        report(*given, **named)
        synchronisations.is_counting = False

    monkeypatch.setattr(loop, "forward_backward", starting)
    monkeypatch.setattr(loop, "report_finished_steps", ending)
    with synchronisations:
        train_tiny(changes | {"saving.saves": 1, "saving.state_every": 6})
    assert counted == [2, 3, 4, 5]
    assert not synchronisations.stacks, synchronisations.stacks[0]

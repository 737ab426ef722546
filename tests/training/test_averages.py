"""Averaged weights: they are saved and sampled, and the training goes on from its own."""

import pytest
import torch

from tests.training.helpers import adapter_of, on_step_done, same, session_of
from trainer.runs import run_folder, run_requests, run_status
from trainer.training import saving
from trainer.training.runner import STOPPED, run_in

MOVING_AVERAGE = {"training.ema_decay": 0.95}
SCHEDULE_FREE = {
    "training.optimizer": "schedule_free_adamw",
    "training.lr_schedule": "constant",
}


def test_the_moving_average_is_saved_and_the_training_weights_are_restored(tiny_run):
    session = session_of(tiny_run({"training.ema_decay": 0.9}))
    optimisation = session.optimisation
    first = next(iter(optimisation.parameters.values()))
    for value in (1.0, 2.0, 4.0):
        with torch.no_grad():
            first.fill_(value)
        optimisation.average.step(optimisation.parameters.values())
    # The decay grows: 0 (a copy), 2/11, 3/12. So the initial weights have no share.
    expected = 1.0 * 2 / 11 + 2.0 * 9 / 11
    expected = expected * 3 / 12 + 4.0 * 9 / 12
    with saving.final_weights(session):
        torch.testing.assert_close(first.detach(), torch.full_like(first, expected))
    assert torch.equal(first, torch.full_like(first, 4.0))


def test_schedule_free_weights_are_averaged_only_while_saving(tiny_run):
    session = session_of(tiny_run(SCHEDULE_FREE))
    optimizer, parameters = session.optimisation.optimizer, session.optimisation.parameters
    for step in (1, 2, 3):
        for number, parameter in enumerate(parameters.values()):
            draws = torch.Generator().manual_seed(100 * step + number)
            parameter.grad = torch.randn(parameter.shape, generator=draws)
        optimizer.step()

    def copies():
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}

    before = copies()
    with saving.final_weights(session):
        saved = copies()
    assert same(copies(), before)
    assert not any(torch.equal(saved[name], before[name]) for name in before)
    assert optimizer.param_groups[0]["train_mode"]


@pytest.mark.parametrize("changes", [MOVING_AVERAGE, SCHEDULE_FREE], ids=["ema", "schedule-free"])
def test_runs_with_averages_resume_to_the_bit(tiny_run, train_tiny, monkeypatch, changes):
    whole = train_tiny(changes)
    folder = run_folder.create(tiny_run(changes))
    with monkeypatch.context() as patch:
        on_step_done(patch, 4, lambda: run_requests.request(folder, "stop"))
        assert run_in(folder) == STOPPED
    assert run_status.read_status(folder).state == "stopped"
    assert run_in(folder) == 0
    assert same(adapter_of(folder), adapter_of(whole))
    ours, theirs = (run_status.read_status(each).validation_losses for each in (folder, whole))
    assert ours[-1] == theirs[-1]

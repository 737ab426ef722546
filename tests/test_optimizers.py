"""Learning-rate schedules: where they start, where they end, what they are in between."""

import pytest
import torch

from trainer import config
from trainer.optimizers import build_optimizer, lr_factor, set_learning_rate


def run_with(**training):
    return config.replace(config.RunConfig(), {f"training.{name}": value for name, value in training.items()})


@pytest.mark.parametrize("schedule, middle, last", [("constant", 1.0, 1.0), ("linear", 0.5, 0.01), ("cosine", 0.5, 0.0003)])
def test_schedules(schedule, middle, last):
    run = run_with(lr_schedule=schedule, warmup=0.0)
    factors = [lr_factor(run, step, 100) for step in range(1, 101)]
    assert factors[0] == 1.0 and factors[50] == pytest.approx(middle) and factors[-1] == pytest.approx(last, abs=2e-4)


def test_warm_up_rises_to_the_full_rate():
    run = run_with(lr_schedule="constant", warmup=0.1)
    factors = [lr_factor(run, step, 100) for step in range(1, 101)]
    assert factors[:10] == pytest.approx([i / 11 for i in range(1, 11)]) and set(factors[10:]) == {1.0}


def test_rates_stay_apart_and_zero_leaves_a_group_out():
    a, b, c = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
    optimizer = build_optimizer([([a], 1e-3), ([b], 1e-4), ([c], 0.0)], run_with())
    assert set_learning_rate(optimizer, 0.5) == 5e-4
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 5e-5]
    assert all(c is not p for group in optimizer.param_groups for p in group["params"])

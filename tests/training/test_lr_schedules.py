"""Learning-rate schedules: where they start and end, and the warm-up."""

import pytest

from trainer import config
from trainer.errors import ConfigError
from trainer.runs import run_folder, run_status
from trainer.training import lr_schedules
from trainer.training.lr_schedules import lr_factor
from trainer.training.runner import run_in


def run_with(**training):
    changes = {f"training.{name}": value for name, value in training.items()}
    return config.replace(config.RunConfig(), changes)


def factors(run, total):
    return [lr_factor(run, step, total) for step in range(1, total + 1)]


def test_every_schedule_of_the_settings_is_implemented():
    field = config.Training.model_fields["lr_schedule"]
    assert set(config.choices(field)) == set(lr_schedules.SCHEDULES)


@pytest.mark.parametrize(
    ("schedule", "quarter", "middle", "last"),
    [
        ("constant", 1.0, 1.0, 1.0),
        ("linear", 0.75, 0.5, 0.0),
        ("cosine", 0.85355, 0.5, 0.0),
        # Three cosines: 0.75 of the first, half of the second.
        ("cosine_with_restarts", 0.14645, 0.5, 0.0),
        ("polynomial", 0.5625, 0.25, 0.0),
    ],
)
def test_schedule_factors_at_a_quarter_half_and_end(schedule, quarter, middle, last):
    run = run_with(lr_schedule=schedule, warmup=0.0)
    by_step = factors(run, 101)
    assert by_step[0] == 1.0
    assert by_step[25] == pytest.approx(quarter, abs=1e-5)
    assert by_step[50] == pytest.approx(middle)
    assert by_step[-1] == last
    assert factors(run, 1) == [1.0], "a run of one step trains at the full rate"


def test_lr_cycles_and_lr_power_change_their_schedules():
    restarting = run_with(lr_schedule="cosine_with_restarts", lr_cycles=4, warmup=0.0)
    at_full_rate = [index for index, each in enumerate(factors(restarting, 101)) if each == 1.0]
    assert at_full_rate == [0, 25, 50, 75]
    linear = run_with(lr_schedule="polynomial", lr_power=1.0, warmup=0.0)
    assert lr_factor(linear, 51, 101) == 0.5


@pytest.mark.parametrize("warmup", [0.1, 10.0])
def test_warm_up_rises_linearly_to_the_full_rate(warmup):
    by_step = factors(run_with(lr_schedule="constant", warmup=warmup), 100)
    assert by_step[:10] == pytest.approx([step / 11 for step in range(1, 11)])
    assert by_step[10:] == [1.0] * 90


def test_a_warm_up_longer_than_the_run_is_refused(tiny_run):
    with pytest.raises(ConfigError, match="training.warmup"):
        run_with(warmup=2.5)
    with pytest.raises(ConfigError, match="does not fit into a run of 6"):
        tiny_run({"training.warmup": 6.0})
    # Without training.steps the length of the run depends on the dataset.
    by_views = {"training.warmup": 6.0, "training.steps": 0, "training.views_per_picture": 3}
    folder = run_folder.create(tiny_run(by_views))
    assert run_in(folder) == 1
    assert "does not fit into a run of 6" in run_status.read_status(folder).message


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_linear_schedule_ends_at_zero_in_the_last_step(train_tiny, accumulation):
    folder = train_tiny(
        {
            "training.lr_schedule": "linear",
            "training.steps": 3,
            "training.gradient_accumulation_steps": accumulation,
            "saving.saves": 1,
        }
    )
    rates = [float(rate) for _, rate in run_status.read_status(folder).learning_rates]
    assert rates == pytest.approx([1e-2, 5e-3, 0.0])
    assert rates[-1] == 0.0

"""Schedules: where they start and end. Optimisers: that each runs, takes its arguments, and goes on from its stored memory to the bit."""

import json

import pytest
import torch
from pytorch_optimizer import get_supported_optimizers
from safetensors.torch import load_file

from trainer import config
from trainer.errors import ConfigError, StateError
from trainer.runs import events, run_folder, run_requests, run_status
from trainer.training import lr_schedules, optimizers, saving, trainer_state
from trainer.training.lr_schedules import lr_factor, set_learning_rate
from trainer.training.optimizers import (
    build_optimizer,
    optimizer_state,
    restore_optimizer,
    try_optimizer,
)
from trainer.training.runner import STOPPED, run_in
from trainer.training.trainer_state import RunIdentity, TrainerState

CPU = torch.device("cpu")
NEEDS = {
    "prodigy": {"training.learning_rate": 1.0},
    "schedule_free_adamw": {"training.lr_schedule": "constant"},
    "collection": {"training.optimizer_name": "came"},
}


def run_with(optimizer="adamw", **training):
    return config.replace(
        config.RunConfig(),
        {"training.optimizer": optimizer}
        | NEEDS.get(optimizer, {})
        | {f"training.{name}": value for name, value in training.items()},
    )


@pytest.mark.parametrize(
    "schedule, quarter, middle, last",
    [
        ("constant", 1.0, 1.0, 1.0),
        ("linear", 0.75, 0.5, 0.0),
        ("cosine", 0.85355, 0.5, 0.0),
        (
            "cosine_with_restarts",
            0.14645,
            0.5,
            0.0,
        ),  # three cosines: 0.75 of the first, half of the second
        ("polynomial", 0.5625, 0.25, 0.0),
    ],
)
def test_schedule_factors_at_a_quarter_half_and_end(schedule, quarter, middle, last):
    run = run_with(lr_schedule=schedule, warmup=0.0)
    factors = [lr_factor(run, step, 101) for step in range(1, 102)]
    assert (
        factors[0] == 1.0
        and factors[25] == pytest.approx(quarter, abs=1e-5)
        and factors[50] == pytest.approx(middle)
    )
    assert factors[-1] == last and lr_factor(run, 1, 1) == 1.0


def test_lr_cycles_and_lr_power_change_their_schedules():
    restarting = [
        lr_factor(run_with(lr_schedule="cosine_with_restarts", lr_cycles=4, warmup=0.0), step, 101)
        for step in range(1, 102)
    ]
    assert [step for step, factor in enumerate(restarting) if factor == 1.0] == [0, 25, 50, 75]
    assert lr_factor(run_with(lr_schedule="polynomial", lr_power=1.0, warmup=0.0), 51, 101) == 0.5


@pytest.mark.parametrize("warmup", [0.1, 10.0])
def test_warm_up_rises_linearly_to_the_full_rate(warmup):
    run = run_with(lr_schedule="constant", warmup=warmup)
    factors = [lr_factor(run, step, 100) for step in range(1, 101)]
    assert factors[:10] == pytest.approx([i / 11 for i in range(1, 11)]) and set(factors[10:]) == {
        1.0
    }


def test_a_warm_up_longer_than_the_run_is_refused(tiny_run):
    with pytest.raises(ConfigError, match="neither a fraction"):
        run_with(warmup=2.5)
    with pytest.raises(ConfigError, match="does not fit into a run of 6"):
        tiny_run({"training.warmup": 6.0})
    folder = run_folder.create(
        tiny_run({"training.warmup": 6.0, "training.steps": 0, "training.views_per_picture": 3})
    )
    assert (
        run_in(folder) == 1 and "does not fit into a run of 6" in run_status.read_status(folder).message
    )


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_linear_schedule_ends_at_zero_in_the_last_step(train_tiny, accumulation):
    folder = train_tiny(
        {
            "training.steps": 3,
            "training.gradient_accumulation_steps": accumulation,
            "saving.saves": 1,
        }
    )
    rates = [float(rate) for rate in dict(run_status.read_status(folder).learning_rates).values()]
    assert rates == pytest.approx([1e-2, 5e-3, 0.0]) and rates[-1] == 0.0


def test_each_group_has_its_learning_rate_and_zero_drops_the_group():
    a, b, c = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
    optimizer = build_optimizer([([a], 1e-3), ([b], 1e-4), ([c], 0.0)], run_with())
    assert set_learning_rate(optimizer, 0.5) == 5e-4
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 5e-5]
    assert all(c is not p for group in optimizer.param_groups for p in group["params"])


# Optimisers

ON_A_CPU = [name for name in optimizers.OPTIMIZERS if name != "adamw8bit"]
SLOW = {"a2grad", "dash", "kron", "shampoo", "spectralsphere"}  # half a second and more each


def steps(optimizer, weights, numbers, run, total=8):
    """Steps on made-up gradients, at the rate of their schedule."""
    for step in numbers:
        set_learning_rate(optimizer, lr_factor(run, step, total))
        draws = torch.Generator().manual_seed(step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=draws)
        optimizer.step()


def fresh(run):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.zeros(3, 4))]
    rate = run.training.learning_rate
    return weights, build_optimizer([(weights[:1], rate), (weights[1:], rate)], run)


@pytest.mark.parametrize(
    "field, table", [("optimizer", optimizers.OPTIMIZERS), ("lr_schedule", lr_schedules.SCHEDULES)]
)
def test_every_choice_of_a_setting_is_implemented(field, table):
    assert set(config.choices(config.Training.model_fields[field])) == set(table)


@pytest.mark.parametrize("name", ON_A_CPU)
def test_an_optimizer_resumes_to_the_bit(name, tmp_path):
    run = run_with(name, warmup=2.0)
    straight, optimizer = fresh(run)
    steps(optimizer, straight, range(1, 9), run)
    weights, optimizer = fresh(run)
    steps(optimizer, weights, range(1, 5), run)
    tensors, rest = optimizer_state(optimizer)
    adapter = {"0": weights[0].detach(), "1": weights[1].detach()}
    state = TrainerState(RunIdentity("", {}, 0.0))
    checkpoint = trainer_state.Checkpoint(4, adapter, tensors, {}, rest, state)
    trainer_state.save_checkpoint(tmp_path, checkpoint)
    stored, _ = trainer_state.load_checkpoint(tmp_path)
    weights, optimizer = fresh(run)
    trainer_state.restore_parameters({"0": weights[0], "1": weights[1]}, stored.adapter)
    restore_optimizer(optimizer, stored.optimizer, stored.optimizer_record)
    steps(optimizer, weights, range(5, 9), run)
    assert (
        all(torch.equal(a, b) for a, b in zip(straight, weights, strict=True)) and straight[1].any()
    )


@pytest.mark.parametrize("name", ON_A_CPU)
def test_restoring_step_0_clears_moments_and_counters(name):
    """There it remembered nothing: neither moments nor counters of the steps since may stay."""
    run = run_with(name)
    weights, optimizer = fresh(run)
    start = optimizer_state(optimizer)
    steps(optimizer, weights, range(1, 4), run)
    restore_optimizer(optimizer, *start)
    assert optimizer_state(optimizer) == start


def test_each_optimizer_gives_another_adapter(train_tiny):
    """All of them in real runs: none may do what another does."""
    found = {}
    for name in ON_A_CPU:
        run = {"training.optimizer": name, "training.steps": 3, "saving.saves": 1} | NEEDS.get(
            name, {}
        )
        folder = train_tiny(run)
        found[name] = torch.cat(
            [
                t.flatten()
                for key, t in sorted(load_file(folder / "tiny.safetensors").items())
                if "lora" in key
            ]
        )
    assert all(not torch.equal(found[a], found[b]) for a in found for b in found if a < b)


def test_unusable_optimizers_of_the_collection_are_refused_before_the_run():
    usable, refused = [], {}
    for name in sorted(set(get_supported_optimizers()) - SLOW):
        try:
            try_optimizer(
                run_with(
                    "collection", optimizer_name=name, lr_schedule="constant", learning_rate=1.0
                ),
                CPU,
            )
            usable.append(name)
        except ConfigError as error:
            refused[name] = str(error)
    assert len(usable) >= 90 and {
        "adopt",
        "ademamix",
        "soap",
        "came",
        "prodigy",
        "stableadamw",
    } <= set(usable)
    assert (
        "could not be resumed" in refused["madgrad"]
        and "closure" in refused["lbfgs"]
        and "GaLoreProjector" in refused["conda"]
    )
    for name in ("adopy", "bnb_adam8bit", "os.system", "../x"):
        with pytest.raises(ConfigError, match="the collection has no"):
            try_optimizer(run_with("collection", optimizer_name=name), CPU)


def test_optimizer_args_reach_the_optimizer():
    group = fresh(run_with(optimizer_args=("betas=(0.8, 0.9)", "eps = 1e-6"), weight_decay=0.5))[
        1
    ].param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.9), 1e-6, 0.5)
    with pytest.raises(ConfigError, match="adamw takes no beta; it takes lr, betas"):
        fresh(run_with(optimizer_args=("beta=1",)))
    with pytest.raises(ConfigError, match="adamw cannot be made from these settings .*beta"):
        fresh(run_with(optimizer_args=("betas=(2.0, 0.9)",)))


@pytest.mark.parametrize(
    "argument",
    [
        "betas",
        "eps=__import__('os').system('x')",
        "eps=torch.load",
        "lr=1",
        "weight_decay=1",
        "a.b=1",
        "eps=" + "(" * 150,
        "x=1;y=2",
    ],
)
def test_optimizer_args_accept_only_literals(argument):
    with pytest.raises(ConfigError, match="training.optimizer_args"):
        run_with(optimizer_args=(argument,))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"optimizer": "prodigy", "learning_rate": 1e-4}, "finds the learning rate itself"),
        (
            {"optimizer": "prodigy", "text_encoder_learning_rate": 0.5},
            "finds the learning rate itself",
        ),
        (
            {"optimizer": "schedule_free_adamw", "lr_schedule": "cosine"},
            "replaces the schedule",
        ),
        ({"optimizer": "schedule_free_adamw", "ema_decay": 0.9}, "averages the weights by itself"),
        ({"optimizer": "collection", "optimizer_name": ""}, "optimizer_name"),
        ({"optimizer": "adamw", "optimizer_name": "came"}, "optimizer_name"),
    ],
)
def test_contradictory_optimizer_settings_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        run_with(**changes)


def test_adamw_replaces_8_bit_adamw_without_a_gpu(train_tiny):
    short = {"training.steps": 2, "saving.saves": 1}
    folder = train_tiny({"training.optimizer": "adamw8bit"} | short)
    assert any(
        "adamw8bit cannot be used here" in warning for warning in run_status.read_status(folder).warnings
    )
    eight, full = (load_file(f / "tiny.safetensors") for f in (folder, train_tiny(short)))
    assert all(torch.equal(eight[name], full[name]) for name in full)


def test_the_state_of_another_optimizer_is_refused():
    tensors, rest = optimizer_state(fresh(run_with("lion"))[1])
    with pytest.raises(StateError, match="trained with Lion"):
        restore_optimizer(fresh(run_with())[1], tensors, json.loads(json.dumps(rest)))


# What is saved


def averaging_session(tiny_run, changes):
    from trainer.training.setup import prepare

    run = tiny_run(changes)
    folder = run_folder.create(run)
    return prepare(run, folder, events.EventLog(folder / "events.jsonl"))


def test_the_moving_average_is_saved_and_the_training_weights_are_restored(tiny_run):
    session = averaging_session(tiny_run, {"training.ema_decay": 0.9})
    first, *_ = session.optimisation.parameters.values()
    values = [first.detach().clone()]
    for value in (1.0, 2.0, 4.0):
        with torch.no_grad():
            first.fill_(value)
        session.optimisation.average.step(session.optimisation.parameters.values())
        values.append(first.detach().clone())
    # Decays 0 (a copy), 2/11, 3/12: the weights before the first step have no share.
    expected = 1.0 * 2 / 11 + 2.0 * 9 / 11
    expected = expected * 3 / 12 + 4.0 * 9 / 12
    with saving.final_weights(session):
        torch.testing.assert_close(first.detach(), torch.full_like(first, expected))
    assert torch.equal(first, values[-1])


def test_schedule_free_weights_are_averaged_only_while_saving(tiny_run):
    session = averaging_session(
        tiny_run, {"training.optimizer": "schedule_free_adamw", "training.lr_schedule": "constant"}
    )
    for step in (1, 2, 3):
        for number, parameter in enumerate(session.optimisation.parameters.values()):
            parameter.grad = torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(100 * step + number)
            )
        session.optimisation.optimizer.step()
    before = {name: p.detach().clone() for name, p in session.optimisation.parameters.items()}
    with saving.final_weights(session):
        inside = {name: p.detach().clone() for name, p in session.optimisation.parameters.items()}
    assert all(torch.equal(p, before[name]) for name, p in session.optimisation.parameters.items())
    assert all(not torch.equal(inside[name], before[name]) for name in before)
    assert session.optimisation.optimizer.param_groups[0]["train_mode"]


@pytest.mark.parametrize(
    "changes",
    [
        {"training.ema_decay": 0.95},
        {"training.optimizer": "schedule_free_adamw", "training.lr_schedule": "constant"},
    ],
)
def test_runs_with_averages_resume_to_the_bit(tiny_run, train_tiny, monkeypatch, changes):
    whole = train_tiny(changes)
    folder = run_folder.create(tiny_run(changes))
    append = events.EventLog.append

    def stop_at_four(self, event):
        append(self, event)
        if isinstance(event, events.StepDone) and event.step == 4:
            run_requests.request(folder, "stop")

    monkeypatch.setattr(events.EventLog, "append", stop_at_four)
    assert run_in(folder) == STOPPED and run_status.read_status(folder).state == "stopped"
    monkeypatch.setattr(events.EventLog, "append", append)
    assert run_in(folder) == 0
    ours, theirs = (load_file(f / "tiny.safetensors") for f in (folder, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert run_status.read_status(folder).validation_losses[-1] == run_status.read_status(whole).validation_losses[-1]

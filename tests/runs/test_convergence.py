"""Convergence: the best save, early stopping, and the assessment of recorded and made-up runs."""

import json
from pathlib import Path
from statistics import stdev

import pytest

from trainer import config
from trainer.runs import convergence, events, run_folder, run_lock, run_status
from trainer.runs.console import TerminalLog
from trainer.runs.convergence import Assessment
from trainer.runs.events import Validated

RECORDED = Path(__file__).parents[1] / "recorded" / "guidance" / "overlong.jsonl"
"""Events of a run on the embedded base with the example subject and 3 validation images."""
NAN = float("nan")
UNDERFIT = Assessment("learning", 0.1, "", "underfit")
OVERFIT = Assessment("memorising", 0.9, "", "overfit")
DIVERGING = Assessment("learning", 0.05, "", "diverging")
READY = Assessment("ready", 0.5, "")


def validated(step, *parts):
    return Validated(step, sum(parts) / len(parts), list(parts))


def curve(*points):
    """Returns a validation every ten steps from (validation, training) losses."""
    spread = [0.01, -0.01, 0.02, -0.02]
    return [
        Validated(10 * index, loss, [loss + part for part in spread], training_loss)
        for index, (loss, training_loss) in enumerate(points)
    ]


def test_losses_are_compared_in_pairs():
    """The images differ far more from each other than the two saves do."""
    better = validated(1, 0.1, 0.5, 0.9, 0.3)
    worse = validated(2, 0.11, 0.51, 0.91, 0.31)
    assert convergence.is_worse(worse, better)
    assert not convergence.is_worse(better, worse)
    assert convergence.loss_difference(worse, better) == pytest.approx((0.01, 0.0))


def test_the_error_of_a_difference_is_the_standard_error_of_its_mean():
    difference = convergence.loss_difference(
        validated(1, 1.0, 2.0, 6.0), validated(2, 0.0, 0.0, 0.0)
    )
    assert difference == pytest.approx((3.0, stdev([1, 2, 6]) / 3**0.5))


def test_a_higher_loss_within_the_standard_error_is_not_worse():
    better = validated(1, 0.1, 0.5, 0.9, 0.3)
    by_chance = validated(2, 0.2, 0.4, 0.95, 0.28)
    assert by_chance.loss > better.loss
    assert not convergence.is_worse(by_chance, better)


FALLING = [
    validated(0, 0.6, 0.7, 0.8),
    validated(1, 0.5, 0.6, 0.7),
    validated(2, 0.4, 0.5, 0.6),
    validated(3, 0.3, 0.4, 0.5),
]


def best_step(validations, saves=range(1, 9)):
    best = convergence.best_save(validations, saves)
    return best.step if best else None


def test_the_best_save_of_a_falling_loss_is_the_last():
    assert best_step(FALLING) == 3
    assert best_step(FALLING, saves=[1, 2]) == 2


def test_the_best_save_of_a_flat_loss_is_the_latest():
    flat = [*FALLING, validated(4, 0.34, 0.37, 0.5)]
    assert flat[4].loss > flat[3].loss
    assert best_step(flat) == 4
    slightly_worse = [*flat, validated(5, 0.31, 0.41, 0.51)]
    assert convergence.is_worse(slightly_worse[5], slightly_worse[3])
    assert best_step(slightly_worse) == 5, "a rise of a thirtieth of the fall is tolerated"


def test_a_save_after_a_clear_rise_is_not_the_best():
    assert best_step([*FALLING, validated(4, 0.33, 0.43, 0.53)]) == 3


def test_without_saves_there_is_no_best_one():
    assert best_step(FALLING, saves=[]) is None
    assert best_step([]) is None


def test_a_loss_that_is_not_finite_is_the_worst():
    """An adapter can overflow in half precision."""
    falling = curve((1.0, 1.0), (0.6, 0.6), (0.5, 0.5))
    broken = [*falling, Validated(30, NAN, [NAN, 0.1], NAN)]
    assert convergence.is_worse(broken[3], broken[0])
    assert best_step(broken, saves=range(1, 99)) == 20
    assert best_step(broken[3:], saves=range(1, 99)) is None
    assert convergence.has_stopped_improving(broken, 1)
    assert not convergence.has_stopped_improving(falling, 1)


def test_a_loss_that_is_not_finite_is_assessed_as_diverging():
    broken = [*curve((1.0, 1.0), (0.6, 0.6), (0.5, 0.5)), Validated(30, NAN, [NAN, 0.1], NAN)]
    assessment = convergence.assess(broken)
    assert assessment.problem == "diverging"
    assert "step 30" in assessment.sentence
    recovered = [*broken, Validated(40, 0.5, [0.49, 0.51], 0.45)]
    assert convergence.assess(recovered).zone == "ready"


def test_a_run_is_assessed_without_a_validation_at_step_0():
    """The base's own loss cannot be measured if memory runs out."""
    later = curve((1.0, 1.0), (0.6, 0.6), (0.5, 0.5))[1:]
    assert convergence.assess(later).zone == "learning"


@pytest.mark.parametrize(
    "losses, patience, expected",
    [
        ([5, 4, 3], 1, False),
        ([5, 4, 4], 1, True),
        ([5, 4, 6, 3], 2, False),
        ([5, 4, 6, 5], 2, True),
        ([5, 6], 2, False),
        ([5, 4, 4], 0, False),
    ],
)
def test_patience_is_the_number_of_saves_without_a_lower_loss(losses, patience, expected):
    saves = [Validated(step, loss) for step, loss in enumerate(losses)]
    assert convergence.has_stopped_improving(saves, patience) is expected


def assess_recorded_run(step):
    found = [
        event
        for event in events.read_events(RECORDED)
        if isinstance(event, Validated) and event.step <= step
    ]
    return convergence.assess(found, ended=True)


def test_a_recorded_run_goes_from_learning_to_memorising():
    short, middle, long = (assess_recorded_run(step) for step in (100, 200, 450))
    assert (short.zone, short.problem) == ("learning", "underfit")
    assert "still falls" in short.sentence
    assert (long.zone, long.problem) == ("memorising", "overfit")
    assert "memorises them" in long.sentence
    assert short.gauge < 1 / 3 and long.gauge > 2 / 3
    assert short.gauge < middle.gauge < long.gauge


@pytest.mark.parametrize(
    "points, zone, problem, words",
    [
        ([(1.0, 1.0), (0.8, 0.8)], "learning", "underfit", "still falls (-20% so far)"),
        ([(1.0, 1.0), (0.99, 0.99), (0.99, 0.98)], "learning", "underfit", "hardly fallen"),
        (
            [(1.0, 1.0), (0.6, 0.6), (0.5, 0.5), (0.5, 0.45), (0.5, 0.43)],
            "ready",
            "",
            "has settled (-50% against the base)",
        ),
        (
            [(1.0, 1.0), (0.5, 0.4), (0.6, 0.3), (0.7, 0.2)],
            "memorising",
            "overfit",
            "Since step 10 the validation loss rises (+40%), "
            "while the loss on training images still falls (to 20% of the base's)",
        ),
        (
            [(1.0, 1.0), (0.5, 0.4), (0.6, 0.5), (0.7, 0.7)],
            "learning",
            "diverging",
            "Both losses rise since step 10",
        ),
        (
            [(1.0, 1.0), (1.2, 1.1), (1.3, 1.2)],
            "learning",
            "diverging",
            "rises instead of falling",
        ),
    ],
)
def test_each_shape_of_the_losses_has_its_zone(points, zone, problem, words):
    assessment = convergence.assess(curve(*points), ended=True)
    assert (assessment.zone, assessment.problem) == (zone, problem)
    assert words in assessment.sentence
    third = ("learning", "ready", "memorising").index(zone)
    assert third / 3 <= assessment.gauge <= (third + 1) / 3


def test_a_run_that_continues_is_not_called_underfit():
    still_falling = curve((1.0, 1.0), (0.8, 0.8))
    assert convergence.assess(still_falling, ended=False).problem == ""


def test_one_validation_is_not_assessed():
    assert convergence.assess(curve((1.0, 1.0)), ended=True) is None


def test_a_run_without_a_validation_set_is_not_assessed():
    assert convergence.assess([Validated(step, 1 / (1 + step), [1.0]) for step in range(5)]) is None


@pytest.mark.parametrize(
    "last, expected",
    [
        ([], "the run continues"),
        ([events.Failed("x")], "the run has ended"),
        ([events.Stopped(10, "")], "the run has ended"),
    ],
)
def test_only_a_run_with_a_trainer_continues(outputs, last, expected):
    folder = run_folder.create(config.RunConfig())
    log = events.EventLog(folder / "events.jsonl")
    for event in (
        events.Launched(1, "0"),
        events.Started(0, 40, 9, 1, 1, "CPU", "fp32", "", "sd1"),
        *curve((1.0, 1.0), (0.8, 0.8)),
        events.StepDone(10, 0.1, 1e-4, 0.1),
        *last,
    ):
        log.append(event)
    lock = run_lock.acquire(folder)
    assert expected in run_status.read_status(folder).assessment.sentence
    lock.release()
    assert "the run has ended" in run_status.read_status(folder).assessment.sentence


def test_changes_against_underfitting_contain_the_numbers_of_the_run():
    assert convergence.suggest_changes(config.RunConfig(), UNDERFIT) == [
        "raise the rank (16 to 32)",
        "add targets (attention to attention+feed-forward)",
        "raise the learning rate (0.0001 to 0.00015)",
        "train longer",
    ]


def test_an_optimizer_that_finds_its_learning_rate_is_not_given_a_higher_one():
    changes = {"training.optimizer": "prodigy", "training.learning_rate": 1.0}
    run = config.replace(config.RunConfig(), changes)
    suggestions = convergence.suggest_changes(run, UNDERFIT)
    assert not any("learning rate" in each for each in suggestions)


def test_changes_against_overfitting():
    run = config.RunConfig()
    expected = [
        "train fewer steps",
        "lower the rank (16 to 8)",
        "more dropout (0.1)",
        "more images",
    ]
    assert convergence.suggest_changes(run, OVERFIT) == expected
    last = config.replace(run, {"saving.main": "last"})
    with_star = ["use the save marked with a star", *expected]
    assert convergence.suggest_changes(last, OVERFIT) == with_star
    dropping = config.replace(run, {"adapter.dropout": 0.2})
    assert "more dropout (0.1)" not in convergence.suggest_changes(dropping, OVERFIT)
    loha = config.replace(run, {"adapter.kind": "loha"})
    assert "more dropout (0.1)" not in convergence.suggest_changes(loha, OVERFIT)


def test_a_diverging_run_gets_a_third_of_its_learning_rate():
    assert convergence.suggest_changes(config.RunConfig(), DIVERGING) == [
        "lower the learning rate (0.0001 to 3.3e-05)"
    ]


def test_only_a_long_run_gets_advice_on_speed():
    changes = {"adapter.targets": "linear", "training.gradient_checkpointing": True}
    run = config.replace(config.RunConfig(), changes)
    assert convergence.suggest_changes(run, READY) == []
    assert convergence.suggest_changes(run, READY, 7200) == []
    assert convergence.suggest_changes(run, READY, 7201) == [
        "to be faster: fewer targets, gradient checkpointing off, a bigger batch"
    ]


def replay_recorded_run(log):
    for event in events.read_events(RECORDED):
        log.append(event)


def test_the_page_shows_a_run_whose_loss_is_not_finite(outputs):
    from app.views import charts, run_cards
    from app.views.progress import progress_view

    folder = run_folder.create(config.RunConfig(name="diverged"))
    log = events.EventLog(folder / "events.jsonl")
    replay_recorded_run(log)
    best = run_status.read_status(folder).best_step
    log.append(Validated(460, NAN, [NAN, 0.5, 0.4], NAN))
    log.append(events.AdapterSaved(460, "long-000460.safetensors"))
    assert charts.curve_view()["best"] == best
    assert progress_view()["gauge"]["needle"] < 0.1
    assert len(run_cards.library_view()["cards"]) == 1
    json.dumps(charts.curve_view(), allow_nan=False)


def test_the_page_and_the_terminal_show_the_assessment(outputs, capsys):
    from app.views import run_cards
    from app.views.progress import progress_view

    folder = run_folder.create(config.RunConfig(name="long"))
    log = TerminalLog(folder / "events.jsonl")
    replay_recorded_run(log)
    log.close()
    printed = capsys.readouterr().out
    assert printed.count("\nLearning: ") == 1, "a zone is printed when it changes"
    assert "Memorising: " in printed
    assert "For the next run: train fewer steps; lower the rank (16 to 8)" in printed
    gauge = progress_view()["gauge"]
    assert gauge["zone"] == "memorising" and gauge["changes"]
    assert run_cards.library_view()["cards"][0]["gauge"] == gauge

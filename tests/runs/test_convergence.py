"""The run guides: which save is the best, when to end, and what the numbers say."""

import json
import time
from pathlib import Path
from statistics import stdev

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from trainer import config
from trainer.errors import ConfigError
from trainer.inference import sample_checks
from trainer.lora import analysis
from trainer.lora.formats.adapted_module import AdaptedModule
from trainer.lora.formats.reader import read_adapter
from trainer.runs import convergence, events, run_folder, run_lock, run_requests, run_status
from trainer.runs.events import Validated
from trainer.training.runner import STOPPED, run_in

OVERLONG = {
    "training.steps": 24,
    "training.lr_schedule": "constant",
    "adapter.rank": 8,
    "adapter.alpha": 8.0,
    "saving.saves": 6,
}


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    from tests.tiny import make_dataset

    return make_dataset(tmp_path_factory.mktemp("guidance") / "dataset", count=12)


def measured(step, *parts):
    return Validated(step, sum(parts) / len(parts), list(parts))


def test_a_difference_is_told_in_pairs():
    """The pictures differ far more from each other than the saves do, and still the better save is known."""
    better, worse = measured(1, 0.1, 0.5, 0.9, 0.3), measured(2, 0.11, 0.51, 0.91, 0.31)
    assert convergence.is_worse(worse, better) and not convergence.is_worse(better, worse)
    assert convergence.loss_difference(worse, better) == pytest.approx((0.01, 0.0))
    assert convergence.loss_difference(
        measured(1, 1.0, 2.0, 6.0), measured(2, 0.0, 0.0, 0.0)
    ) == pytest.approx((3.0, stdev([1, 2, 6]) / 3**0.5))
    chance = measured(2, 0.2, 0.4, 0.95, 0.28)
    assert not convergence.is_worse(chance, better) and chance.loss > better.loss


def test_the_best_is_the_latest_that_is_not_clearly_worse():
    falling = [
        measured(0, 0.6, 0.7, 0.8),
        measured(1, 0.5, 0.6, 0.7),
        measured(2, 0.4, 0.5, 0.6),
        measured(3, 0.3, 0.4, 0.5),
    ]
    saves = range(1, 9)
    assert (
        convergence.best_save(falling, saves).step == 3
        and convergence.best_save(falling, [1, 2]).step == 2
    )
    flat = [*falling, measured(4, 0.34, 0.37, 0.5)]
    assert convergence.best_save(flat, saves).step == 4 and flat[4].loss > flat[3].loss, "by chance"
    a_little = [*flat, measured(5, 0.31, 0.41, 0.51)]
    assert (
        convergence.is_worse(a_little[5], a_little[3])
        and convergence.best_save(a_little, saves).step == 5
    ), "a thirtieth of what it fell"
    assert convergence.best_save([*a_little, measured(6, 0.33, 0.43, 0.53)], saves).step == 5
    assert convergence.best_save(falling, []) is convergence.best_save([], saves) is None


def test_a_loss_that_is_no_number_is_the_worst_and_nothing_breaks():
    """An adapter that overflows half precision, or a base whose own loss could not be measured for want of memory."""
    nan = float("nan")
    fine = curve((1.0, 1.0), (0.6, 0.6), (0.5, 0.5))
    broken = [*fine, Validated(30, nan, [nan, 0.1], nan)]
    assert (
        convergence.best_save(broken, range(1, 99)).step == 20
        and convergence.best_save(broken[3:], range(1, 99)) is None
    )
    assert convergence.has_stopped_improving(broken, 1) and not convergence.has_stopped_improving(
        fine, 1
    )
    assessment = convergence.assess(broken)
    assert assessment.problem == "diverging" and "step 30" in assessment.sentence
    assert convergence.assess([*broken, Validated(40, 0.5, [0.49, 0.51], 0.45)]).zone == "ready"
    assert (
        convergence.assess(fine[1:]).zone == "learning"
    )  # without step 0, none of them early enough to compare with


@pytest.mark.parametrize(
    "losses, patience, dry",
    [
        ([5, 4, 3], 1, False),
        ([5, 4, 4], 1, True),
        ([5, 4, 6, 3], 2, False),
        ([5, 4, 6, 5], 2, True),
        ([5, 6], 2, False),
        ([5, 4, 4], 0, False),
    ],
)
def test_patience_counts_the_saves_without_a_lower_loss(losses, patience, dry):
    assert (
        convergence.has_stopped_improving(
            [Validated(step, loss) for step, loss in enumerate(losses)], patience
        )
        is dry
    )


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"training.early_stop": 2, "dataset.hold_out": 0.0}, "hold_out"),
        ({"training.early_stop": 5, "saving.saves": 5}, "can never end"),
    ],
)
def test_early_stop_that_cannot_act_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        config.replace(config.RunConfig(), changes)


def rising(monkeypatch, losses):
    """Each measuring finds the next of these."""
    from trainer.training import validation

    found = iter(losses)
    monkeypatch.setattr(validation, "validation_losses", lambda session: [next(found)] * 4)


def test_the_best_save_is_the_finished_file_unless_the_last_is_wanted(
    tiny_run, twelve, monkeypatch
):
    for main, step in (("best", 8), ("last", 24)):
        rising(monkeypatch, [0.9, 0.5, 0.4, 0.45, 0.5, 0.6, 0.7])
        folder = run_folder.create(
            tiny_run(OVERLONG | {"dataset.folder": str(twelve), "saving.main": main})
        )
        assert run_in(folder) == 0
        status = run_status.read_status(folder)
        assert (status.best_step, status.finished.best_step, status.finished.file_step) == (
            8,
            8,
            step,
        )
        assert (folder / "tiny.safetensors").read_bytes() == (
            folder / f"tiny-{step:06d}.safetensors"
        ).read_bytes()
        assert load_file(folder / "tiny.safetensors") and status.state == "finished"


def test_early_stop_ends_the_run_and_a_resumed_run_ends_there_too(tiny_run, twelve, monkeypatch):
    rising(monkeypatch, [0.9, 0.5, 0.4, 0.45, 0.5, 0.3])
    folder = run_folder.create(
        tiny_run(OVERLONG | {"dataset.folder": str(twelve), "training.early_stop": 2})
    )
    assert run_in(folder) == 0
    status = run_status.read_status(folder)
    assert (status.state, status.step, status.finished.file_step) == (
        "finished",
        16,
        8,
    ) and "has not fallen for 2 saves" in status.ended_early
    kept = (folder / "tiny.safetensors").read_bytes()
    log = (folder / "events.jsonl").read_text().splitlines()
    cut = next(
        number for number, line in enumerate(log) if '"StepDone"' in line and '"step": 13' in line
    )
    (folder / "events.jsonl").write_text("\n".join(log[: cut + 1]) + "\n")
    for path in (folder / "state").iterdir():
        if int(path.name) > 14:
            path.rename(folder / f"gone-{path.name}")
    rising(monkeypatch, [0.5])
    assert run_in(folder) == 0
    again = run_status.read_status(folder)
    assert (again.state, again.step, again.finished.file_step) == ("finished", 16, 8) and (
        folder / "tiny.safetensors"
    ).read_bytes() == kept


def test_early_stop_ends_a_run_whose_losses_are_no_numbers(tiny_run, twelve, monkeypatch):
    rising(monkeypatch, [0.9, float("nan"), float("nan"), float("nan")])
    folder = run_folder.create(
        tiny_run(OVERLONG | {"dataset.folder": str(twelve), "training.early_stop": 2})
    )
    assert run_in(folder) == 0
    status = run_status.read_status(folder)
    assert (status.step, status.file_step) == (12, 12) and "that of step 12" in status.ended_early


def test_early_stop_without_held_out_pictures_is_said(train_tiny):
    status = run_status.read_status(train_tiny({"training.early_stop": 1}))
    assert status.step == 6 and any(
        "training.early_stop has no effect" in warning for warning in status.warnings
    )


def test_what_is_measured_is_the_same_twice_and_finer_for_few_pictures(tiny_run, twelve):
    from trainer.training import validation
    from trainer.training.setup import prepare

    for share, parts in ((0.1, 32), (0.25, 48), (0.3, 32)):
        run = tiny_run({"dataset.folder": str(twelve), "dataset.hold_out": share})
        folder = run_folder.create(run)
        session = prepare(run, folder, events.EventLog(folder / "events.jsonl"))
        once, trained = validation.validation_losses(session), validation.training_loss(session)
        assert len(once) == parts and once == pytest.approx(
            validation.validation_losses(session), abs=1e-6
        )
        assert trained == pytest.approx(validation.training_loss(session), abs=1e-6)
        session.fallbacks.pieces["validate"] = 4
        assert validation.validation_losses(session) == pytest.approx(once, rel=1e-5)


def test_a_stopped_run_hands_out_its_best_save(tiny_run, twelve, monkeypatch):
    rising(monkeypatch, [0.9, 0.4, 0.5, 0.6])
    folder = run_folder.create(tiny_run(OVERLONG | {"dataset.folder": str(twelve)}))
    append = events.EventLog.append

    def stop_at_ten(self, event):
        append(self, event)
        if isinstance(event, events.StepDone) and event.step == 10:
            run_requests.request(folder, "stop")

    monkeypatch.setattr(events.EventLog, "append", stop_at_ten)
    assert run_in(folder) == STOPPED
    assert (folder / "tiny.safetensors").read_bytes() == (
        folder / "tiny-000004.safetensors"
    ).read_bytes()


RECORDED = Path(__file__).parents[1] / "recorded" / "guidance"
"""Events of real runs on the embedded base: the example subject, three of its twelve pictures held out."""


def reading_at(name, step):
    """Where a recorded run stood after a step."""
    found = [
        event
        for event in events.read_events(RECORDED / f"{name}.jsonl")
        if isinstance(event, Validated) and event.step <= step
    ]
    return convergence.assess(found, ended=True)


def test_a_short_run_is_learning_and_an_over_long_one_memorising():
    short, middle, long = (reading_at("overlong", step) for step in (100, 200, 450))
    assert (short.zone, short.problem) == (
        "learning",
        "underfit",
    ) and "still falls" in short.sentence
    assert (long.zone, long.problem) == (
        "memorising",
        "overfit",
    ) and "memorises them" in long.sentence
    assert short.gauge < middle.gauge < long.gauge


def curve(*points):
    """(held-out, training) losses, a save every ten steps."""
    parts = [0.01, -0.01, 0.02, -0.02]
    return [
        Validated(10 * number, out, [out + part for part in parts], own)
        for number, (out, own) in enumerate(points)
    ]


@pytest.mark.parametrize(
    "points, zone, fault",
    [
        ([(1.0, 1.0)], None, ""),
        ([(1.0, 1.0), (0.8, 0.8)], "learning", "underfit"),
        ([(1.0, 1.0), (0.99, 0.99), (0.99, 0.98)], "learning", "underfit"),
        ([(1.0, 1.0), (0.6, 0.6), (0.5, 0.5), (0.5, 0.45), (0.5, 0.43)], "ready", ""),
        ([(1.0, 1.0), (0.5, 0.4), (0.6, 0.3), (0.7, 0.2)], "memorising", "overfit"),
        ([(1.0, 1.0), (0.5, 0.4), (0.6, 0.5), (0.7, 0.7)], "learning", "diverging"),
        ([(1.0, 1.0), (1.2, 1.1), (1.3, 1.2)], "learning", "diverging"),
    ],
)
def test_the_zones(points, zone, fault):
    assessment = convergence.assess(curve(*points), ended=True)
    assert (assessment and assessment.zone) == zone and (
        not assessment or assessment.problem == fault
    )


def test_nothing_held_out_says_nothing():
    assert convergence.assess([Validated(step, 1 / (1 + step), [1.0]) for step in range(5)]) is None


@pytest.mark.parametrize(
    "last, said",
    [
        ([], "the run continues"),
        ([events.Failed("x")], "the run has ended"),
        ([events.Stopped(10, "")], "the run has ended"),
    ],
)
def test_only_a_run_at_work_goes_on(outputs, last, said):
    folder = run_folder.create(config.RunConfig())
    log = events.EventLog(folder / "events.jsonl")
    started = events.Started(0, 40, 9, 1, 1, "CPU", "fp32", "", "sd1")
    for event in (
        events.Launched(1, "0"),
        started,
        *curve((1.0, 1.0), (0.8, 0.8)),
        events.StepDone(10, 0.1, 1e-4, 0.1),
        *last,
    ):
        log.append(event)
    lock = run_lock.acquire(folder)
    assert said in run_status.read_status(folder).assessment.sentence
    lock.release()
    assert "the run has ended" in run_status.read_status(folder).assessment.sentence, (
        "without its trainer"
    )


def test_what_to_change_follows_the_fault_and_the_settings():
    run, weak = config.RunConfig(), convergence.Assessment("learning", 0.1, "", "underfit")
    advice = convergence.suggest_changes(run, weak)
    assert advice == [
        "raise the rank (16 to 32)",
        "add targets (attention to attention+feed-forward)",
        "raise the learning rate (0.0001 to 0.00015)",
        "train longer",
    ]
    finds_its_own = config.replace(
        run, {"training.optimizer": "prodigy", "training.learning_rate": 1.0}
    )
    assert not any(
        "learning rate" in each for each in convergence.suggest_changes(finds_its_own, weak)
    )
    over = convergence.suggest_changes(
        run, convergence.Assessment("memorising", 0.9, "", "overfit")
    )
    assert (
        "lower the rank (16 to 8)" in over
        and "more dropout (0.1)" in over
        and "train fewer steps" in over
        and "more images" in over
    )
    assert over[0] == "train fewer steps"
    last = config.replace(run, {"saving.main": "last"})
    assert (
        convergence.suggest_changes(last, convergence.Assessment("memorising", 0.9, "", "overfit"))[
            0
        ]
        == "use the save marked with a star"
    )
    dropping = config.replace(
        run,
        {
            "adapter.dropout": 0.2,
            "adapter.targets": "linear",
            "training.gradient_checkpointing": True,
        },
    )
    assert "more dropout (0.1)" not in convergence.suggest_changes(
        dropping, convergence.Assessment("memorising", 0.9, "", "overfit")
    )
    ready = convergence.Assessment("ready", 0.5, "")
    assert convergence.suggest_changes(dropping, ready) == []
    assert convergence.suggest_changes(dropping, ready, 10_000) == [
        "to be faster: fewer targets, gradient checkpointing off, a bigger batch"
    ]


def test_a_loss_that_is_no_number_leaves_the_page_standing(outputs):
    from app.views import charts, run_cards
    from app.views.progress import progress_view

    folder = run_folder.create(config.RunConfig(name="burnt"))
    log = events.EventLog(folder / "events.jsonl")
    for event in events.read_events(RECORDED / "overlong.jsonl"):
        log.append(event)
    best = run_status.read_status(folder).best_step
    log.append(Validated(460, float("nan"), [float("nan"), 0.5, 0.4], float("nan")))
    log.append(events.AdapterSaved(460, "long-000460.safetensors"))
    assert (
        charts.curve_view()["best"] == best
        and progress_view()["gauge"]["needle"] < 0.1
        and len(run_cards.library_view()["cards"]) == 1
    )
    json.dumps(charts.curve_view(), allow_nan=False)


def test_page_and_terminal_say_where_a_run_stands(outputs, capsys):
    from app.views import run_cards
    from app.views.progress import progress_view
    from trainer.runs.console import TerminalLog

    folder = run_folder.create(config.RunConfig(name="long"))
    log = TerminalLog(folder / "events.jsonl")
    for event in events.read_events(RECORDED / "overlong.jsonl"):
        log.append(event)
    log.close()
    said = capsys.readouterr().out
    assert (
        "Learning: " in said
        and "Memorising: " in said
        and "For the next run: train fewer steps; lower the rank (16 to 8)" in said
    )
    gauge = progress_view()["gauge"]
    assert (
        gauge["zone"] == "memorising"
        and gauge["changes"]
        and run_cards.library_view()["cards"][0]["gauge"] == gauge
    )


def test_on_the_embedded_base_the_best_save_of_an_over_long_run_beats_its_last(outputs):
    """Six photographs, which this base cannot draw, at a learning rate that is far too high: some fifteen seconds of real training."""
    from trainer.config import presets
    from trainer.models.model_files import EMBEDDED_FOLDER

    changes = {
        "dataset.folder": str(EMBEDDED_FOLDER.parent / "examples" / "photos"),
        "dataset.hold_out": 0.5,
        "adapter.targets": "linear",
        "adapter.rank": 16,
        "adapter.alpha": 16.0,
        "training.steps": 60,
        "training.batch_size": 2,
        "training.learning_rate": 1e-2,
        "training.text_encoder_learning_rate": 0.0,
        "training.lr_schedule": "constant",
        "saving.saves": 3,
        "sampling.inference_steps": 1,
        "sampling.prompts": ["a"],
    }
    folder = run_folder.create(
        config.replace(presets.load_preset("embedded-subject").config, changes)
    )
    assert run_in(folder) == 0
    status = run_status.read_status(folder)
    held_out = dict(status.validation_losses)
    assert status.finished.file_step == status.best_step < status.step
    assert held_out[status.best_step] < 0.95 * held_out[status.step]


def test_a_leak_is_the_change_without_the_trigger_against_that_with_it():
    black, grey, white = (Image.new("RGB", (64, 64), (level,) * 3) for level in (0, 102, 255))
    assert sample_checks.leak((black, white), (black, black)) == 0
    assert sample_checks.leak((black, white), (black, grey)) == pytest.approx(0.4)
    assert sample_checks.leak((black, black), (black, grey)) is None


def test_a_copy_is_nearer_than_the_pictures_are_to_each_other():
    draws = torch.Generator().manual_seed(0)
    pictures = [torch.randn(4, 8, 8 + 4 * (number % 2), generator=draws) for number in range(6)]
    copied, between = sample_checks.likeness(
        [pictures[0] + 0.05 * torch.randn(4, 8, 8, generator=draws)], pictures
    )
    new, _ = sample_checks.likeness([torch.randn(4, 8, 8, generator=draws)], pictures)
    assert copied > 0.95 and abs(new) < 0.3 and between < 0.3
    assert sample_checks.likeness([pictures[0]], pictures[:1]) is None


def test_each_save_is_probed_without_the_trigger(train_tiny):
    """What an adapter of noise does without the trigger is seen, and alters no other number."""
    from app.views.samples import samples_view

    changes = {
        "dataset.trigger": "zorbit",
        "sampling.prompts": ["a zorbit on the moon", "a zorbit"],
        "training.learning_rate": 0.3,
    }
    folder = train_tiny(changes)
    status = run_status.read_status(folder)
    assert [found.step for found in status.probes] == [0, 3, 6] and {
        found.prompt for found in status.probes
    } == {"on the moon"}
    assert status.probes[0].leak is None and all(found.leak > 0 for found in status.probes[1:])
    assert all(
        (folder / found.file).is_file() and -1 <= found.likeness <= 1 for found in status.probes
    )
    assert [saved.file.split("-")[-1] for saved in status.samples[-2:]] == ["0.png", "1.png"]
    shown = samples_view()
    assert [picture["leak"] for picture in shown["without"]["pictures"]] == [
        found.leak for found in status.probes
    ]
    assert len(shown["rows"]) == 2 and len(shown["likeness"]) == 3
    plain = run_status.read_status(train_tiny(changes | {"sampling.prompts": ["the moon"]}))
    assert (
        not any(found.file for found in plain.probes)
        and plain.losses == status.losses
        and samples_view()["without"] is None
    )


def test_the_spectrum_tells_the_rank_that_would_have_been_enough():
    """A change of known singular values: 10, 3, 1 and 0.1."""
    draws = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(8, 4, generator=draws))[0] for _ in range(2))
    tensors = {
        "lora_up.weight": left * torch.tensor([10.0, 3.0, 1.0, 0.1]),
        "lora_down.weight": right.T.contiguous(),
    }
    modules = [AdaptedModule("unet", "down_blocks.1.attentions.0.to_q", "lora", tensors, 1.0)]
    modules.append(
        AdaptedModule("text_encoder", "encoder.layers.2.self_attn.q_proj", "lora", tensors, 0.5)
    )
    found = analysis.analyse(modules)
    assert found["blocks"] == [
        ["down 1", pytest.approx(110.01**0.5, rel=1e-4)],
        ["text 2", pytest.approx(110.01**0.5 / 2, rel=1e-4)],
    ]
    assert found["modules"][0]["values"] == pytest.approx([10, 3, 1, 0.1], rel=1e-3)
    assert (
        found["enough"] == found["modules"][0]["enough"] == {"95": 2, "99": 2}
        and found["rank"] == 4
    )
    assert sum(found["spectrum"]) == pytest.approx(1) and found["spectrum"][0] == pytest.approx(
        100 / 110.01, rel=1e-3
    )
    assert analysis.sufficient_ranks([[6.0, 3.0, 1.0]]) == {
        "95": 3,
        "99": 3,
    } and analysis.sufficient_ranks([[99.5, 0.5]]) == {"95": 1, "99": 1}


@pytest.mark.parametrize(
    "component, name, block",
    [
        ("unet", "mid_block.attentions.0.proj_in", "middle"),
        ("unet", "up_blocks.2.resnets.0.conv1", "up"),
        ("transformer", "transformer_blocks.11.attn.to_q", "block"),
        ("text_encoder_2", "text_model.encoder.layers.3.mlp.fc1", "text 2"),
    ],
)
def test_every_family_has_its_blocks(component, name, block):
    assert analysis.block_of(AdaptedModule(component, name, "lora", {}, 1.0))[1] == block


def test_a_finished_run_shows_what_it_learned_and_is_made_smaller_by_a_click(train_tiny):
    from app.tabs import train as tab
    from app.views import charts

    folder = train_tiny(
        {"training.text_encoder_learning_rate": 1e-3, "adapter.rank": 3, "saving.precision": "fp32"}
    )
    shown = charts.learned_view()
    assert [name for name, norm in shown["blocks"] if norm > 0] == [
        "down 0",
        "middle",
        "up 1",
        "text 0",
        "text 1",
    ]
    assert (
        shown["rank"] == 3
        and 1 <= shown["enough"]["95"] <= shown["enough"]["99"] <= 3
        and len(shown["modules"]) > 10
    )
    job = tab.shrink({"run": folder.name, "rank": 1})["job"]
    end = time.monotonic() + 200
    while "progress" in (answer := tab.shrunk({"job": job})):
        assert time.monotonic() < end
        time.sleep(0.2)
    assert {module.rank for module in read_adapter(folder / answer["file"]["name"]).modules} == {1}
    assert "whole number" in tab.shrink({"run": folder.name, "rank": 0.5})["error"]
    (folder / "learned.json").unlink()
    assert (
        charts.learned_view() == {}
        and "Library" in tab.shrink({"run": folder.name, "rank": 1})["error"]
    )


@pytest.mark.parametrize("kind", ["dora", "loha"])
def test_kinds_without_a_plain_spectrum_still_show_where_they_learned(train_tiny, kind):
    facts = json.loads(
        (
            train_tiny({"adapter.kind": kind, "training.steps": 2, "saving.saves": 1})
            / "learned.json"
        ).read_text()
    )
    assert "enough" not in facts and any(norm > 0 for _, norm in facts["blocks"])

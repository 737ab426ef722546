"""Skipped steps, rollbacks, stops, failures, and what a person requests during a run."""

import errno
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests.training.helpers import adapter_of, events_of, on_step_done, poison, same
from trainer.families.sd1 import StableDiffusion1
from trainer.lora import writer
from trainer.runs import events, run_folder, run_requests, run_status
from trainer.training import loop, training_samples
from trainer.training.runner import STOPPED, run_in
from trainer.training.step import optimizer_step

# Numbers that are not finite


def test_a_step_with_nan_is_skipped_with_a_warning(train_tiny, monkeypatch):
    poison(monkeypatch, {3})
    folder = train_tiny()
    warnings = run_status.read_status(folder).warnings
    assert any("Step 3 was skipped" in warning for warning in warnings)
    assert [event.step for event in events_of(folder, events.StepDone)] == [1, 2, 4, 5, 6]
    assert all(torch.isfinite(tensor).all() for tensor in adapter_of(folder).values())


def test_a_run_that_stays_nan_fails_and_keeps_its_checkpoint(tiny_run, monkeypatch):
    poison(monkeypatch, set(range(4, 100)))
    folder = run_folder.create(tiny_run({"training.steps": 20}))
    assert run_in(folder) == 1
    status = run_status.read_status(folder)
    assert status.state == "failed"
    assert "Lower the learning rate" in status.message
    assert status.can_resume
    assert (folder / "state" / "000002").is_dir()


def learning_rates(folder):
    return [rate for _, rate in run_status.read_status(folder).learning_rates]


def test_bad_steps_roll_back_with_a_lower_learning_rate_and_resuming_repeats_it(
    tiny_run, monkeypatch
):
    poison(monkeypatch, {4, 5, 6})
    folder = run_folder.create(tiny_run({"training.lr_schedule": "constant", "training.steps": 8}))
    assert run_in(folder) == 0
    (rollback,) = events_of(folder, events.RolledBack)
    assert (rollback.step, rollback.from_step, rollback.lr_scale) == (2, 6, 0.5)
    assert learning_rates(folder) == pytest.approx([0.01, 0.01, *[0.005] * 6])
    warnings = run_status.read_status(folder).warnings
    assert any("went back to step 2" in warning for warning in warnings)

    adapter = adapter_of(folder)
    shutil.rmtree(max((folder / "state").iterdir()))
    assert run_in(folder) == 0
    assert learning_rates(folder)[-1] == pytest.approx(0.005)
    assert same(adapter, adapter_of(folder))


def test_rolling_back_to_step_0_resets_the_optimiser(train_tiny, monkeypatch):
    """The checkpoint of step 0 has no moments; those of the bad steps must not stay."""
    settings = {
        "training.lr_schedule": "constant",
        "training.steps": 8,
        "saving.saves": 1,
        "saving.state_every": 100,
    }
    with monkeypatch.context() as patch:
        poison(patch, {4, 5, 6})
        folder = train_tiny(settings)
    warnings = run_status.read_status(folder).warnings
    assert any("went back to step 0" in warning for warning in warnings)
    from_the_start = train_tiny(settings | {"training.learning_rate": 0.005})
    assert same(adapter_of(folder), adapter_of(from_the_start))


def test_weights_that_are_not_finite_are_never_saved(tiny_run, monkeypatch):
    """A step may break the weights although its loss and its gradients were finite."""
    real, calls = loop.clip_gradients, iter(range(1, 100))

    def breaking(session, scaler):
        if next(calls) == 4:
            first = next(iter(session.optimisation.parameters.values()))
            first.data.fill_(float("inf"))
        return real(session, scaler)

    monkeypatch.setattr(loop, "clip_gradients", breaking)
    folder = run_folder.create(tiny_run())
    assert run_in(folder) == 0
    warnings = run_status.read_status(folder).warnings
    assert any("went back to step" in warning for warning in warnings)
    saved = [*folder.glob("*.safetensors"), *folder.glob("state/*/*.safetensors")]
    assert len(saved) >= 7
    for path in saved:
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values()), path


def test_the_image_that_causes_nan_is_named(tiny_run, monkeypatch):
    real = loop.prepare

    def prepare_with_broken_latents(*given):
        session = real(*given)
        examples = session.data.examples
        index = next(i for i, example in enumerate(examples) if example.name == "02.png")
        view = examples[index].views[0]
        broken = replace(view, mean=view.mean * float("nan"))
        examples[index] = replace(examples[index], views=(broken,))
        return session

    monkeypatch.setattr(loop, "prepare", prepare_with_broken_latents)
    folder = run_folder.create(tiny_run({"training.batch_size": 4}))
    assert run_in(folder) == 0
    warnings = run_status.read_status(folder).warnings
    assert warnings
    assert all("The latents of 02.png are not finite" in warning for warning in warnings)


# Gradients


def test_a_run_without_gradients_fails(tiny_run, monkeypatch):
    def detached(self, denoiser, noised, batch):
        return noised.noisy_latents.detach().requires_grad_()

    monkeypatch.setattr(StableDiffusion1, "predict", detached)
    folder = run_folder.create(tiny_run())
    assert run_in(folder) == 1
    status = run_status.read_status(folder)
    assert status.state == "failed"
    assert "No gradient reached the adapter in the unet" in status.message
    assert not status.adapters


@pytest.mark.parametrize("dropout", ["module_dropout", "rank_dropout"])
def test_a_run_whose_dropout_leaves_out_every_module_does_not_fail(train_tiny, dropout):
    """There is a single layer, and the first step leaves it out."""
    train_tiny(
        {
            "adapter.target_pattern": "mid_block.*attn1.to_q",
            f"adapter.{dropout}": 0.8,
            "adapter.rank": 1,
            "training.batch_size": 1,
        }
    )


def test_an_adapter_without_effect_fails_the_run(tiny_run, monkeypatch):
    monkeypatch.setattr(loop, "check_gradients_arrive", lambda *given: None)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *given, **named: None)
    folder = run_folder.create(tiny_run())
    assert run_in(folder) == 1
    assert "changes nothing" in run_status.read_status(folder).message


# Failures


def test_a_full_disk_is_reported_and_keeps_the_checkpoint(tiny_run, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(writer, "atomic_write", full)
    folder = run_folder.create(tiny_run())
    assert run_in(folder) == 1
    status = run_status.read_status(folder)
    assert "No space left on device" in status.message
    assert "tiny-000003.safetensors" in status.message
    assert status.can_resume


def test_a_failed_sample_does_not_end_the_run(train_tiny, monkeypatch):
    def fail(*given, **named):
        raise RuntimeError("no room for an image")

    monkeypatch.setattr(training_samples, "generate", fail)
    status = run_status.read_status(train_tiny())
    assert status.state == "finished"
    assert any("no room for an image" in warning for warning in status.warnings)


def test_a_bug_prints_its_traceback_and_reports_one_line(tiny_run, monkeypatch, capsys):
    monkeypatch.setattr(optimizer_step, "microbatch_losses", lambda *given: 1 / 0)
    folder = run_folder.create(tiny_run())
    assert run_in(folder) == 1
    message = run_status.read_status(folder).message
    assert "inside the trainer (ZeroDivisionError" in message
    assert "\n" not in message
    assert "Traceback" in capsys.readouterr().err


# Requests


def test_stop_saves_and_resuming_finishes(tiny_run, monkeypatch):
    folder = run_folder.create(tiny_run({"training.steps": 8}))
    with monkeypatch.context() as patch:
        on_step_done(patch, 3, lambda: run_requests.request(folder, "stop"))
        assert run_in(folder) == STOPPED
    status = run_status.read_status(folder)
    assert (status.state, status.step) == ("stopped", 3)
    assert (folder / "tiny.safetensors").is_file()
    assert run_in(folder) == 0
    assert run_status.read_status(folder).state == "finished"


def test_a_run_stopped_before_its_first_step_can_be_resumed(tiny_run, monkeypatch):
    folder = run_folder.create(tiny_run())
    append = events.EventLog.append

    def stop_at_start(self, event):
        append(self, event)
        if isinstance(event, events.Started):
            run_requests.request(folder, "stop")

    with monkeypatch.context() as patch:
        patch.setattr(events.EventLog, "append", stop_at_start)
        assert run_in(folder) == STOPPED
    status = run_status.read_status(folder)
    assert (status.state, status.step, status.adapters) == ("stopped", 0, [])
    assert status.can_resume
    assert run_in(folder) == 0
    assert run_status.read_status(folder).state == "finished"


def test_saving_and_sampling_on_request_do_not_change_the_training(tiny_run, train_tiny):
    folder = run_folder.create(tiny_run())
    for request in ("save", "sample"):
        run_requests.request(folder, request)
    assert run_in(folder) == 0
    assert [event.step for event in events_of(folder, events.AdapterSaved)] == [1, 3, 6]
    assert [event.step for event in events_of(folder, events.SampleSaved)] == [0, 1, 3, 6]
    assert not run_requests.requested(folder, "save")
    assert not run_requests.requested(folder, "sample")
    assert same(adapter_of(folder), adapter_of(train_tiny()))


def test_a_pause_waits_until_it_is_withdrawn(tiny_run, monkeypatch, train_tiny):
    folder = run_folder.create(tiny_run())
    waits = []

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            run_requests.withdraw(folder, "pause")

    with monkeypatch.context() as patch:
        patch.setattr(loop.time, "sleep", wait)
        on_step_done(patch, 2, lambda: run_requests.request(folder, "pause"))
        assert run_in(folder) == 0
    assert len(waits) == 3
    happened = [event for event in events_of(folder) if hasattr(event, "step")]
    kinds = [type(event).__name__ for event in happened]
    paused, continued = kinds.index("Paused"), kinds.index("Continued")
    assert continued == paused + 1
    assert happened[paused].step == 2
    assert same(adapter_of(folder), adapter_of(train_tiny()))

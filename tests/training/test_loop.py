"""The training itself, on a tiny real pipeline."""

import errno
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from trainer.families.sd1 import StableDiffusion1
from trainer.lora import inject
from trainer.models import cpu_conv
from trainer.runs import events, run_folder, run_requests, run_status
from trainer.training import loop, training_samples, validation
from trainer.training.runner import STOPPED, run_in
from trainer.training.step import optimizer_step
from trainer.training.step.losses import microbatch_losses, stratified_uniform


def adapter_of(folder):
    return load_file(folder / run_status.read_status(folder).finished.file)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_losses_saves_samples_and_two_checkpoints(train_tiny):
    folder = train_tiny()
    status = run_status.read_status(folder)
    assert (
        status.state == "finished"
        and status.step == status.total_steps == 6
        and len(status.losses) == 6
    )
    assert [a.step for a in status.adapters] == [3, 6] and all(
        (folder / a.file).is_file() for a in status.adapters
    )
    assert [s.step for s in status.samples] == [0, 3, 6] and all(
        (folder / s.file).is_file() for s in status.samples
    )
    assert [point[0] for point in status.validation_losses] == [0, 3, 6] and status.best_step is None
    assert (folder / status.finished.file).read_bytes() == (
        folder / status.adapters[-1].file
    ).read_bytes()
    assert sorted(path.name for path in (folder / "state").iterdir()) == ["000004", "000006"]


def test_training_lowers_the_validation_loss(train_tiny):
    """Forty steps on four pictures: what is measured at fixed noise must fall."""
    folder = train_tiny(
        {"training.steps": 40, "adapter.rank": 8, "adapter.alpha": 8.0, "saving.saves": 1}
    )
    validation = run_status.read_status(folder).validation_losses
    assert validation[-1][1] < 0.97 * validation[0][1]


def test_same_seed_gives_identical_weights_and_another_seed_does_not(train_tiny):
    first, again, other = (adapter_of(train_tiny({"training.seed": seed})) for seed in (1, 1, 2))
    assert same(first, again) and not same(first, other)


def test_sampling_and_saving_do_not_change_the_training(train_tiny):
    plain = train_tiny({"saving.saves": 1})
    busy = train_tiny(
        {
            "saving.saves": 6,
            "saving.state_every": 1,
            "sampling.prompts": ["a", "b"],
            "sampling.seed": 99,
        }
    )
    assert same(adapter_of(plain), adapter_of(busy))


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter.rank": 3},
        {"adapter.alpha": 1.0},
        {"adapter.dropout": 0.5},
        {"training.learning_rate": 1e-3},
        {"training.lr_schedule": "linear"},
        {"training.warmup": 0.5},
        {"training.weight_decay": 1.0},
        {"training.max_grad_norm": 1e-7},
        {"training.batch_size": 1},
        {"training.gradient_accumulation_steps": 2},
        {"objective.min_snr_gamma": 0.0},
        {"objective.noise_offset": 0.5},
        {"objective.timestep_sampling": "logit_normal"},
        {"dataset.caption_dropout": 1.0},
        {"dataset.trigger": "zorbit"},
        {"dataset.resolution": 16},
        {"dataset.bucket_step": 16},
        {"dataset.max_aspect": 1.0},
        {"dataset.allow_upscale": True},
        {"training.text_encoder_learning_rate": 1e-3},
        {"base.precision": "bf16"},
        {"training.steps": 5},
        {"saving.precision": "fp32"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_setting_changes_the_adapter(train_tiny, reference, changes):
    if changes.keys() & {"dataset.allow_upscale"}:
        changes = changes | {"dataset.resolution": 40}
        assert not same(
            adapter_of(train_tiny(changes | {"dataset.allow_upscale": False})),
            adapter_of(train_tiny(changes)),
        )
    else:
        assert not same(
            reference,
            adapter_of(train_tiny({"sampling.prompts": ["a"], "saving.saves": 1} | changes)),
        )


@pytest.fixture(scope="module")
def reference_store():
    return {}


@pytest.fixture
def reference(reference_store, train_tiny):
    if "adapter" not in reference_store:
        reference_store["adapter"] = adapter_of(train_tiny({"saving.saves": 1}))
    return reference_store["adapter"]


def test_gradient_checkpointing_gives_the_same_adapter(train_tiny, reference):
    checkpointed = adapter_of(
        train_tiny({"training.gradient_checkpointing": True, "saving.saves": 1})
    )
    for name, tensor in reference.items():
        torch.testing.assert_close(checkpointed[name], tensor, rtol=2e-2, atol=2e-4)


@pytest.mark.parametrize("optimisation", ["fused layers", "convolutions as matrix products"])
def test_faster_layers_change_losses_only_by_rounding(
    train_tiny, monkeypatch, optimisation
):
    settings = {"training.steps": 20, "training.learning_rate": 1e-3, "saving.saves": 1}
    usual = dict(run_status.read_status(train_tiny(settings)).losses)
    if optimisation == "fused layers":
        monkeypatch.setattr(inject, "register_fused_linear", lambda config: None)
    else:  # which the small layers of the tiny base would not be
        monkeypatch.setattr(cpu_conv, "WEIGHTS_PER_POSITION", 0)
    other = dict(run_status.read_status(train_tiny(settings)).losses)
    assert usual != other and usual == pytest.approx(other, rel=1e-3)


def test_a_component_with_learning_rate_zero_is_not_in_the_file(train_tiny):
    only_text = adapter_of(
        train_tiny({"training.learning_rate": 0.0, "training.text_encoder_learning_rate": 1e-2})
    )
    assert only_text and all(name.startswith("lora_te_") for name in only_text)


def test_accumulated_gradients_are_the_mean_over_microbatches(tiny_run):
    from trainer.training.setup import prepare

    run = tiny_run({"training.batch_size": 1, "training.gradient_accumulation_steps": 3})
    session = prepare(
        run, run_folder.create(run), events.EventLog(run_folder.runs_folder() / "events.jsonl")
    )
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loop.forward_backward(session, 1, scaler)
    summed = {name: p.grad.clone() for name, p in session.optimisation.parameters.items()}
    session.optimisation.optimizer.zero_grad()
    losses = [sum(microbatch_losses(session, i)) for i in range(3)]
    torch.stack(losses).mean().backward()
    for name, parameter in session.optimisation.parameters.items():
        torch.testing.assert_close(summed[name], parameter.grad)


def test_the_validation_loss_of_the_same_weights_is_identical(tiny_run, tmp_path):
    from trainer.training.setup import prepare

    folder = run_folder.create(tiny_run())
    session = prepare(tiny_run(), folder, events.EventLog(folder / "events.jsonl"))
    assert validation.validation_losses(session) == validation.validation_losses(session)


def test_timesteps_of_a_batch_are_stratified():
    draws = (
        torch.stack(
            [stratified_uniform(4, torch.Generator().manual_seed(seed)) for seed in range(400)]
        )
        * 1000
    )
    assert draws.min() < 20 and draws.max() > 980 and abs(float(draws.float().mean()) - 499.5) < 10
    assert all(
        set((row // 250).tolist()) == {0, 1, 2, 3} or len(set((row % 250).tolist())) <= 2
        for row in draws
    )


def test_a_run_without_gradients_fails(tiny_run, monkeypatch):
    monkeypatch.setattr(
        StableDiffusion1,
        "predict",
        lambda self, denoiser, noised, batch: noised.noisy_latents.detach().requires_grad_(),
    )
    folder = run_folder.create(tiny_run())
    assert run_in(folder) == 1
    status = run_status.read_status(folder)
    assert (
        status.state == "failed"
        and "No gradient reached the adapter in the unet" in status.message
        and not status.adapters
    )


@pytest.mark.parametrize("dropout", ["module_dropout", "rank_dropout"])
def test_a_run_whose_dropout_leaves_out_every_module_does_not_fail(train_tiny, dropout):
    """Of a single layer, which is what is left out in the first step."""
    train_tiny(
        {
            "adapter.target_pattern": "mid_block.*attn1.to_q",
            f"adapter.{dropout}": 0.8,
            "adapter.rank": 1,
            "training.batch_size": 1,
        }
    )


def poison(monkeypatch, bad_steps):
    """Makes the loss of some steps not a number, on top of the real one."""
    real, calls = optimizer_step.microbatch_losses, iter(range(1, 1000))

    def poisoned(*given):
        factor = float("nan") if next(calls) in bad_steps else 1.0
        return (factor * loss for loss in real(*given))

    monkeypatch.setattr(optimizer_step, "microbatch_losses", poisoned)


def test_a_step_with_nan_is_skipped_with_a_warning(train_tiny, monkeypatch):
    poison(monkeypatch, {3})
    folder = train_tiny()
    assert any("Step 3 was skipped" in warning for warning in run_status.read_status(folder).warnings)
    assert all(torch.isfinite(t).all() for t in adapter_of(folder).values())


def test_a_run_that_stays_nan_fails_and_keeps_its_checkpoint(tiny_run, monkeypatch):
    poison(monkeypatch, set(range(4, 100)))
    folder = run_folder.create(tiny_run({"training.steps": 20}))
    assert run_in(folder) == 1
    status = run_status.read_status(folder)
    assert (
        status.state == "failed"
        and "Lower the learning rate" in status.message
        and status.can_resume
    )
    assert (folder / "state" / "000002").is_dir()


def rates(folder):
    return [rate for _, rate in run_status.read_status(folder).learning_rates]


def test_bad_steps_roll_back_with_a_lower_learning_rate_and_resuming_repeats_it(
    tiny_run, monkeypatch
):
    poison(monkeypatch, {4, 5, 6})
    folder = run_folder.create(tiny_run({"training.lr_schedule": "constant", "training.steps": 8}))
    assert run_in(folder) == 0
    happened = [
        e for e in events.read_events(folder / "events.jsonl") if isinstance(e, events.RolledBack)
    ]
    assert [(e.step, e.from_step, e.lr_scale) for e in happened] == [(2, 6, 0.5)]
    assert rates(folder) == pytest.approx([0.01, 0.01, *[0.005] * 6])
    assert any("went back to step 2" in warning for warning in run_status.read_status(folder).warnings)
    adapter = adapter_of(folder)
    shutil.rmtree(max((folder / "state").iterdir()))
    assert (
        run_in(folder) == 0
        and rates(folder)[-1] == pytest.approx(0.005)
        and same(adapter, adapter_of(folder))
    )


def test_rolling_back_to_step_0_resets_the_optimiser(tiny_run, train_tiny, monkeypatch):
    """The state of step 0 has no memory; that of the bad steps must not stay."""
    settings = {
        "training.lr_schedule": "constant",
        "training.steps": 8,
        "saving.saves": 1,
        "saving.state_every": 100,
    }
    with monkeypatch.context() as patch:
        poison(patch, {4, 5, 6})
        folder = train_tiny(settings)
    assert any("went back to step 0" in warning for warning in run_status.read_status(folder).warnings)
    assert same(
        adapter_of(folder), adapter_of(train_tiny(settings | {"training.learning_rate": 0.005}))
    )


def test_weights_that_are_not_finite_are_never_saved(tiny_run, monkeypatch):
    """A step that breaks the weights although loss and gradients were fine is seen before they are written."""
    real, calls = loop.clip_gradients, iter(range(1, 100))

    def breaking(session, scaler):
        if next(calls) == 4:
            next(iter(session.optimisation.parameters.values())).data.fill_(float("inf"))
        return real(session, scaler)

    monkeypatch.setattr(loop, "clip_gradients", breaking)
    folder = run_folder.create(tiny_run())
    assert run_in(folder) == 0
    assert any("went back to step" in warning for warning in run_status.read_status(folder).warnings)
    saved = [*folder.glob("*.safetensors"), *folder.glob("state/*/*.safetensors")]
    assert len(saved) >= 7 and all(
        torch.isfinite(t).all() for path in saved for t in load_file(path).values()
    )


def test_the_image_that_causes_nan_is_named(tiny_run, monkeypatch):
    real = loop.prepare

    def prepared(*args):
        session = real(*args)
        broken = [i for i, e in enumerate(session.data.examples) if e.name == "02.png"]
        for i in broken:
            view = replace(
                session.data.examples[i].views[0], mean=session.data.examples[i].mean * float("nan")
            )
            session.data.examples[i] = replace(session.data.examples[i], views=(view,))
        return session

    monkeypatch.setattr(loop, "prepare", prepared)
    folder = run_folder.create(tiny_run({"training.batch_size": 4}))
    run_in(folder)
    assert all(
        "The latents of 02.png are not finite" in warning
        for warning in run_status.read_status(folder).warnings
    )
    assert run_status.read_status(folder).warnings


def test_stop_saves_and_resuming_finishes(tiny_run, monkeypatch):
    folder = run_folder.create(tiny_run({"training.steps": 8}))
    append = events.EventLog.append

    def stop_at_three(self, event):
        append(self, event)
        if isinstance(event, events.StepDone) and event.step == 3:
            run_requests.request(folder, "stop")

    monkeypatch.setattr(events.EventLog, "append", stop_at_three)
    assert run_in(folder) == STOPPED
    status = run_status.read_status(folder)
    assert (
        status.state == "stopped" and status.step == 3 and (folder / "tiny.safetensors").is_file()
    )
    monkeypatch.setattr(events.EventLog, "append", append)
    assert run_in(folder) == 0 and run_status.read_status(folder).state == "finished"


def test_a_run_stopped_before_its_first_step_can_be_resumed(tiny_run, monkeypatch):
    folder = run_folder.create(tiny_run())
    append = events.EventLog.append

    def stop_at_start(self, event):
        append(self, event)
        if (
            isinstance(event, events.Started)
            and event.step == 0
            and not list(folder.glob("state/*"))
        ):
            run_requests.request(folder, "stop")

    monkeypatch.setattr(events.EventLog, "append", stop_at_start)
    assert run_in(folder) == STOPPED
    status = run_status.read_status(folder)
    assert (status.state, status.step, status.adapters) == ("stopped", 0, []) and status.can_resume
    assert run_in(folder) == 0 and run_status.read_status(folder).state == "finished"


def test_a_full_disk_is_reported_and_keeps_the_checkpoint(tiny_run, monkeypatch):
    from trainer.lora import writer

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(writer, "atomic_write", full)
    folder = run_folder.create(tiny_run())
    assert run_in(folder) == 1
    status = run_status.read_status(folder)
    assert (
        "No space left on device" in status.message
        and "tiny-000003.safetensors" in status.message
        and status.can_resume
    )
    monkeypatch.undo()


def test_a_failed_sample_does_not_end_the_run(train_tiny, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no room for a picture")

    monkeypatch.setattr(training_samples, "generate", fail)
    status = run_status.read_status(train_tiny())
    assert status.state == "finished" and any(
        "no room for a picture" in warning for warning in status.warnings
    )


def test_a_file_that_differs_from_the_trained_adapter_fails_the_run(tiny_run, monkeypatch):
    from trainer.lora import writer

    real = writer.to_kohya
    monkeypatch.setitem(
        writer.WRITERS,
        "kohya",
        lambda *a: {n: t * 2 if n.endswith("alpha") else t for n, t in real(*a).items()},
    )
    folder = run_folder.create(tiny_run())
    assert (
        run_in(folder) == 1 and "does not do what was trained" in run_status.read_status(folder).message
    )


def test_a_bug_prints_its_traceback_and_reports_one_line(tiny_run, monkeypatch, capsys):
    monkeypatch.setattr(optimizer_step, "microbatch_losses", lambda *a: 1 / 0)
    folder = run_folder.create(tiny_run())
    assert run_in(folder) == 1
    assert (
        "inside the trainer (ZeroDivisionError" in run_status.read_status(folder).message
        and "Traceback" in capsys.readouterr().err
    )


def test_an_adapter_without_effect_fails_the_run(tiny_run, monkeypatch):
    monkeypatch.setattr(loop, "check_gradients_arrive", lambda *given: None)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: None)
    folder = run_folder.create(tiny_run())
    assert run_in(folder) == 1 and "changes nothing" in run_status.read_status(folder).message


def test_photographs_of_mixed_size_and_orientation_train_unedited(outputs):
    from trainer import config
    from trainer.config import presets
    from trainer.models.model_files import EMBEDDED_FOLDER

    photos = EMBEDDED_FOLDER.parent / "examples" / "photos"
    changes = {
        "dataset.folder": str(photos),
        "training.steps": 2,
        "saving.saves": 1,
        "sampling.inference_steps": 1,
        "sampling.prompts": ["a"],
    }
    folder = run_folder.create(
        config.replace(presets.load_preset("embedded-style").config, changes)
    )
    assert run_in(folder) == 0
    status = run_status.read_status(folder)
    assert status.started.pictures + status.started.held_out == 12 and not status.warnings


def test_saving_and_sampling_on_request_do_not_change_the_training(tiny_run, train_tiny):
    asked = run_folder.create(tiny_run())
    for what in ("save", "sample"):
        run_requests.request(asked, what)
    assert run_in(asked) == 0
    plain = train_tiny()
    happened = list(events.read_events(asked / "events.jsonl"))
    assert [e.step for e in happened if isinstance(e, events.AdapterSaved)] == [1, 3, 6]
    assert [e.step for e in happened if isinstance(e, events.SampleSaved)] == [0, 1, 3, 6]
    assert not run_requests.requested(asked, "save") and not run_requests.requested(asked, "sample")
    assert same(adapter_of(asked), adapter_of(plain))

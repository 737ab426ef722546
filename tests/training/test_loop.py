"""Whole trainings on a tiny real pipeline: what they write, and what each setting changes."""

import pytest
import torch

from tests.training.helpers import adapter_of, same, session_of
from trainer import config
from trainer.config import presets
from trainer.lora import inject, writer
from trainer.models import cpu_conv
from trainer.models.model_files import EMBEDDED_FOLDER
from trainer.runs import run_folder, run_status
from trainer.training import loop
from trainer.training.runner import run_in
from trainer.training.step.losses import microbatch_losses, stratified_uniform


def test_a_run_leaves_losses_saves_samples_and_two_checkpoints(train_tiny):
    folder = train_tiny()
    status = run_status.read_status(folder)
    assert status.state == "finished"
    assert status.step == status.total_steps == 6
    assert [step for step, _ in status.losses] == [1, 2, 3, 4, 5, 6]
    assert [adapter.step for adapter in status.adapters] == [3, 6]
    assert [sample.step for sample in status.samples] == [0, 3, 6]
    for saved in (*status.adapters, *status.samples):
        assert (folder / saved.file).is_file()
    assert [step for step, _ in status.validation_losses] == [0, 3, 6]
    assert status.best_step is None, "there is no validation set"
    chosen, last = folder / status.finished.file, folder / status.adapters[-1].file
    assert chosen.read_bytes() == last.read_bytes()
    assert sorted(path.name for path in (folder / "state").iterdir()) == ["000004", "000006"]


def test_training_lowers_the_validation_loss(train_tiny):
    """Forty steps on four images; the noise of the validation is fixed."""
    settings = {"training.steps": 40, "adapter.rank": 8, "adapter.alpha": 8.0, "saving.saves": 1}
    validation = run_status.read_status(train_tiny(settings)).validation_losses
    (_, first), (_, last) = validation[0], validation[-1]
    assert last < 0.97 * first


def test_same_seed_gives_identical_weights_and_another_seed_does_not(train_tiny):
    first, again, other = (adapter_of(train_tiny({"training.seed": seed})) for seed in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)


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


@pytest.fixture(scope="module")
def reference_store():
    return {}


@pytest.fixture
def reference(reference_store, train_tiny):
    """The adapter of the default settings, trained once for this file."""
    if "adapter" not in reference_store:
        reference_store["adapter"] = adapter_of(train_tiny({"saving.saves": 1}))
    return reference_store["adapter"]


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
        {"training.text_encoder_learning_rate": 1e-3},
        {"base.precision": "bf16"},
        {"training.steps": 5},
        {"saving.precision": "fp32"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_setting_changes_the_adapter(train_tiny, reference, changes):
    changed = train_tiny({"sampling.prompts": ["a"], "saving.saves": 1} | changes)
    assert not same(reference, adapter_of(changed))


def test_allow_upscale_changes_the_adapter_if_images_are_small(train_tiny):
    small = {"dataset.resolution": 40, "saving.saves": 1}
    kept = train_tiny(small | {"dataset.allow_upscale": False})
    enlarged = train_tiny(small | {"dataset.allow_upscale": True})
    assert not same(adapter_of(kept), adapter_of(enlarged))


def test_gradient_checkpointing_gives_the_same_adapter(train_tiny, reference):
    settings = {"training.gradient_checkpointing": True, "saving.saves": 1}
    checkpointed = adapter_of(train_tiny(settings))
    for name, tensor in reference.items():
        torch.testing.assert_close(checkpointed[name], tensor, rtol=2e-2, atol=2e-4)


@pytest.mark.parametrize("optimisation", ["fused layers", "convolutions as matrix products"])
def test_faster_layers_change_losses_only_by_rounding(train_tiny, monkeypatch, optimisation):
    settings = {"training.steps": 20, "training.learning_rate": 1e-3, "saving.saves": 1}
    usual = dict(run_status.read_status(train_tiny(settings)).losses)
    if optimisation == "fused layers":
        monkeypatch.setattr(inject, "register_fused_linear", lambda config: None)
    else:  # the layers of the tiny base would be too small for it
        monkeypatch.setattr(cpu_conv, "WEIGHTS_PER_POSITION", 0)
    other = dict(run_status.read_status(train_tiny(settings)).losses)
    assert usual != other
    assert usual == pytest.approx(other, rel=1e-3)


def test_a_component_with_learning_rate_zero_is_not_in_the_file(train_tiny):
    rates = {"training.learning_rate": 0.0, "training.text_encoder_learning_rate": 1e-2}
    adapter = adapter_of(train_tiny(rates))
    assert adapter
    assert all(name.startswith("lora_te_") for name in adapter)


def test_accumulated_gradients_are_the_mean_over_microbatches(tiny_run):
    settings = {"training.batch_size": 1, "training.gradient_accumulation_steps": 3}
    session = session_of(tiny_run(settings))
    parameters = session.optimisation.parameters
    loop.forward_backward(session, 1, torch.amp.GradScaler("cpu", enabled=False))
    accumulated = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    session.optimisation.optimizer.zero_grad()
    losses = [sum(microbatch_losses(session, microbatch)) for microbatch in range(3)]
    torch.stack(losses).mean().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(accumulated[name], parameter.grad)


def test_timesteps_of_a_batch_are_stratified():
    """Each quarter of the range gets one of four timesteps, and all quarters are used evenly."""
    batches = torch.stack(
        [stratified_uniform(4, torch.Generator().manual_seed(seed)) for seed in range(400)]
    )
    assert 0 <= batches.min() < 0.02
    assert 0.98 < batches.max() < 1
    assert float(batches.mean()) == pytest.approx(0.5, abs=0.01)
    quarters = (batches * 4).floor().sort(dim=1).values
    assert torch.equal(quarters, torch.arange(4.0).expand(400, 4))


def test_a_file_that_differs_from_the_trained_adapter_fails_the_run(tiny_run, monkeypatch):
    real = writer.WRITERS["kohya"]

    def doubling_alpha(*given):
        tensors = real(*given)
        return {name: t * 2 if name.endswith("alpha") else t for name, t in tensors.items()}

    monkeypatch.setitem(writer.WRITERS, "kohya", doubling_alpha)
    folder = run_folder.create(tiny_run())
    assert run_in(folder) == 1
    message = run_status.read_status(folder).message
    assert "tiny-000003.safetensors does not do what was trained" in message


def test_photographs_of_mixed_size_and_orientation_train_unedited(outputs):
    changes = {
        "dataset.folder": str(EMBEDDED_FOLDER.parent / "examples" / "photos"),
        "training.steps": 2,
        "saving.saves": 1,
        "sampling.inference_steps": 1,
        "sampling.prompts": ["a"],
    }
    run = config.replace(presets.load_preset("embedded-style").config, changes)
    folder = run_folder.create(run)
    assert run_in(folder) == 0
    status = run_status.read_status(folder)
    assert status.started.pictures + status.started.held_out == 12
    assert not status.warnings

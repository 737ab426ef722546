"""Early stopping, and the choice of the finished file, in real runs with set validation losses."""

import pytest
from safetensors.torch import load_file

from trainer import config
from trainer.errors import ConfigError
from trainer.runs import events, run_folder, run_requests, run_status
from trainer.training.runner import STOPPED, run_in

LONG_RUN = {
    "training.steps": 24,
    "training.lr_schedule": "constant",
    "adapter.rank": 8,
    "adapter.alpha": 8.0,
    "saving.saves": 6,
}


@pytest.fixture(scope="module")
def twelve_images(tmp_path_factory):
    from tests.tiny import make_dataset

    return make_dataset(tmp_path_factory.mktemp("twelve") / "dataset", count=12)


@pytest.fixture
def long_run(tiny_run, twelve_images):
    """Creates a run with a validation set and six saves, at steps 4, 8, ... 24."""

    def create(changes=None):
        settings = LONG_RUN | {"dataset.folder": str(twelve_images)} | (changes or {})
        return run_folder.create(tiny_run(settings))

    return create


def set_losses(monkeypatch, losses):
    """Makes each validation return the next of these losses; the first is the base's."""
    from trainer.training import validation

    remaining = iter(losses)
    monkeypatch.setattr(validation, "validation_losses", lambda session: [next(remaining)] * 4)


def adapter_bytes(folder, step=None):
    name = "tiny.safetensors" if step is None else f"tiny-{step:06d}.safetensors"
    return (folder / name).read_bytes()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"training.early_stop": 2, "dataset.hold_out": 0.0}, "hold_out"),
        ({"training.early_stop": 5, "saving.saves": 5}, "can never end"),
    ],
)
def test_early_stopping_that_cannot_happen_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config.replace(config.RunConfig(), changes)


@pytest.mark.parametrize("main, step", [("best", 8), ("last", 24)])
def test_the_finished_file_is_the_best_or_the_last_save(long_run, monkeypatch, main, step):
    set_losses(monkeypatch, [0.9, 0.5, 0.4, 0.45, 0.5, 0.6, 0.7])
    folder = long_run({"saving.main": main})
    assert run_in(folder) == 0
    status = run_status.read_status(folder)
    assert status.state == "finished"
    assert status.best_step == status.finished.best_step == 8
    assert status.finished.file_step == step
    assert adapter_bytes(folder) == adapter_bytes(folder, step)
    assert load_file(folder / "tiny.safetensors")


def test_early_stopping_ends_the_run(long_run, monkeypatch):
    set_losses(monkeypatch, [0.9, 0.5, 0.4, 0.45, 0.5, 0.3])
    folder = long_run({"training.early_stop": 2})
    assert run_in(folder) == 0
    status = run_status.read_status(folder)
    assert (status.state, status.step, status.finished.file_step) == ("finished", 16, 8)
    assert "has not fallen for 2 saves" in status.ended_early


def test_a_resumed_run_stops_early_at_the_same_step(long_run, monkeypatch):
    set_losses(monkeypatch, [0.9, 0.5, 0.4, 0.45, 0.5, 0.3])
    folder = long_run({"training.early_stop": 2})
    assert run_in(folder) == 0
    adapter = adapter_bytes(folder)

    # Go back to the moment after step 13, as if the machine had gone down.
    log = folder / "events.jsonl"
    lines = log.read_text().splitlines()
    (cut,) = (i for i, line in enumerate(lines) if '"StepDone"' in line and '"step": 13,' in line)
    log.write_text("\n".join(lines[: cut + 1]) + "\n")
    for checkpoint in (folder / "state").iterdir():
        if int(checkpoint.name) > 14:
            checkpoint.rename(folder / f"gone-{checkpoint.name}")

    set_losses(monkeypatch, [0.5])
    assert run_in(folder) == 0
    status = run_status.read_status(folder)
    assert (status.state, status.step, status.finished.file_step) == ("finished", 16, 8)
    assert adapter_bytes(folder) == adapter


def test_losses_that_are_not_finite_count_for_early_stopping(long_run, monkeypatch):
    set_losses(monkeypatch, [0.9, float("nan"), float("nan"), float("nan")])
    folder = long_run({"training.early_stop": 2})
    assert run_in(folder) == 0
    status = run_status.read_status(folder)
    assert (status.step, status.file_step) == (12, 12)
    assert "step 12" in status.ended_early


def test_early_stopping_without_a_validation_set_is_a_warning(train_tiny):
    status = run_status.read_status(train_tiny({"training.early_stop": 1}))
    assert status.step == 6
    (warning,) = (text for text in status.warnings if "early_stop" in text)
    assert "validation set" in warning


def test_the_finished_file_of_a_stopped_run_is_its_best_save(long_run, monkeypatch):
    set_losses(monkeypatch, [0.9, 0.4, 0.5, 0.6])
    folder = long_run()
    append = events.EventLog.append

    def stop_at_step_10(self, event):
        append(self, event)
        if isinstance(event, events.StepDone) and event.step == 10:
            run_requests.request(folder, "stop")

    monkeypatch.setattr(events.EventLog, "append", stop_at_step_10)
    assert run_in(folder) == STOPPED
    assert adapter_bytes(folder) == adapter_bytes(folder, 4)


@pytest.mark.parametrize("share, parts", [(0.1, 32), (0.25, 48), (0.3, 32)])
def test_validation_losses_repeat_and_small_sets_have_more_of_them(
    tiny_run, twelve_images, share, parts
):
    from trainer.training import validation
    from trainer.training.setup import prepare

    run = tiny_run({"dataset.folder": str(twelve_images), "dataset.hold_out": share})
    folder = run_folder.create(run)
    session = prepare(run, folder, events.EventLog(folder / "events.jsonl"))
    losses = validation.validation_losses(session)
    training_loss = validation.training_loss(session)
    assert len(losses) == parts
    assert losses == pytest.approx(validation.validation_losses(session), abs=1e-6)
    assert training_loss == pytest.approx(validation.training_loss(session), abs=1e-6)
    # The fallback that validates in more pieces changes the losses only by rounding.
    session.fallbacks.pieces["validate"] = 4
    assert validation.validation_losses(session) == pytest.approx(losses, rel=1e-5)


def test_the_best_save_of_an_overlong_run_is_better_than_its_last(outputs):
    """Trains the embedded base for real, at a learning rate that is far too high (15 seconds).

    The dataset is six photographs, which this base cannot draw.
    """
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
    run = config.replace(presets.load_preset("embedded-subject").config, changes)
    folder = run_folder.create(run)
    assert run_in(folder) == 0
    status = run_status.read_status(folder)
    losses = dict(status.validation_losses)
    assert status.finished.file_step == status.best_step < status.step
    assert losses[status.best_step] < 0.95 * losses[status.step]

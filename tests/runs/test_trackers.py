"""A run that reports to a tracker: what arrives there, and that the training never depends on it."""

import pytest

from trainer.errors import ConfigError
from trainer.runs import events, run_folder, run_status, trackers


def warnings(folder) -> list[str]:
    return [
        event.message
        for event in events.read_events(folder / "events.jsonl")
        if isinstance(event, events.Warned)
    ]


def test_losses_and_samples_arrive_in_tensorboard(train_tiny) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train_tiny({"saving.tracking": "tensorboard"})
    found = EventAccumulator(str(folder / "tracking"))
    found.Reload()
    status = run_status.read_status(folder)
    assert [
        (point.step, pytest.approx(point.value, rel=1e-4)) for point in found.Scalars("loss")
    ] == status.losses
    assert [point.step for point in found.Scalars("validation_loss")] == [0, 3, 6]
    assert [point.step for point in found.Images("picture number 0")] == [0, 3, 6] and not warnings(
        folder
    )


def test_a_missing_tracker_is_a_sentence(tiny_run, outputs, monkeypatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    folder = run_folder.create(tiny_run())
    log = events.EventLog(folder / "events.jsonl")
    with (
        pytest.raises(ConfigError, match="pip install wandb"),
        trackers.tracked(tiny_run({"saving.tracking": "wandb"}), folder, log),
    ):
        pass
    with trackers.tracked(tiny_run(), folder, log):
        assert log.listeners == []


def test_a_tracker_that_breaks_ends_nothing(tiny_run, outputs, monkeypatch) -> None:
    class Broken:
        def start(self):
            pass

        def store_init_configuration(self, values):
            pass

        def log(self, values, step):
            raise ConnectionError("no route")

    monkeypatch.setattr(trackers, "build", lambda name, folder: Broken())
    run = tiny_run({"saving.tracking": "tensorboard"})
    folder = run_folder.create(run)
    log = events.EventLog(folder / "events.jsonl")
    told = []
    log.listeners.append(told.append)  # such as the progress of `trainer.run`
    with trackers.tracked(run, folder, log):
        for step in (1, 2):
            log.append(events.StepDone(step, 0.5, 1e-4, 0.1))
    log.append(events.Failed("what came after"))
    assert isinstance(told[-1], events.Failed)
    assert len(warnings(folder)) == 1 and "no route" in warnings(folder)[0]
    assert [step for step, _ in run_status.read_status(folder).losses] == [1, 2]

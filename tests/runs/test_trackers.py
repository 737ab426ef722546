"""Trackers receive losses and samples, and a training never depends on them."""

import pytest

from trainer.errors import ConfigError
from trainer.runs import events, run_folder, run_status, trackers


@pytest.fixture
def folder(tiny_run):
    return run_folder.create(tiny_run())


@pytest.fixture
def log(folder):
    return events.EventLog(folder / "events.jsonl")


def warnings(folder):
    return run_status.read_status(folder).warnings


def test_losses_and_samples_arrive_in_tensorboard(train_tiny):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train_tiny({"saving.tracking": "tensorboard"})
    received = EventAccumulator(str(folder / "tracking"))
    received.Reload()
    losses = [
        (point.step, pytest.approx(point.value, rel=1e-4)) for point in received.Scalars("loss")
    ]
    assert losses == run_status.read_status(folder).losses
    assert [point.step for point in received.Scalars("validation_loss")] == [0, 3, 6]
    assert [point.step for point in received.Images("picture number 0")] == [0, 3, 6]
    assert warnings(folder) == []


def test_a_tracker_that_is_not_installed_is_an_error(tiny_run, folder, log, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with (
        pytest.raises(ConfigError, match="pip install wandb"),
        trackers.tracked(tiny_run({"saving.tracking": "wandb"}), folder, log),
    ):
        pass


def test_a_run_without_a_tracker_has_no_listener(tiny_run, folder, log):
    with trackers.tracked(tiny_run(), folder, log):
        assert log.listeners == []


class Tracker:
    """A tracker that records calls, and fails in one of its methods."""

    def __init__(self, failing=""):
        self.failing = failing
        self.calls = []

    def record(self, name):
        self.calls.append(name)
        if name == self.failing:
            raise ConnectionError("no route")

    def start(self):
        self.record("start")

    def store_init_configuration(self, values):
        self.record("store_init_configuration")

    def log(self, values, step):
        self.record("log")

    def finish(self):
        self.record("finish")


@pytest.mark.parametrize("failing", ["start", "store_init_configuration", "log", "finish"])
def test_a_tracker_that_fails_is_a_warning_and_the_run_continues(
    tiny_run, folder, log, monkeypatch, failing
):
    tracker = Tracker(failing)
    monkeypatch.setattr(trackers, "build", lambda name, folder: tracker)
    received = []
    log.listeners.append(received.append)  # such as the callback of `trainer.run`
    with trackers.tracked(tiny_run({"saving.tracking": "tensorboard"}), folder, log):
        for step in (1, 2):
            log.append(events.StepDone(step, 0.5, 1e-4, 0.1))
    log.append(events.Failed("a later event"))
    assert isinstance(received[-1], events.Failed)
    (warning,) = warnings(folder)
    assert "no route" in warning and "The training continues" in warning
    assert [step for step, _ in run_status.read_status(folder).losses] == [1, 2]
    assert tracker.calls[-1] == failing, "a tracker that failed is not called again"


def test_the_tracker_is_finished_if_the_training_fails(tiny_run, folder, log, monkeypatch):
    tracker = Tracker()
    monkeypatch.setattr(trackers, "build", lambda name, folder: tracker)
    run = tiny_run({"saving.tracking": "tensorboard"})
    with pytest.raises(KeyError), trackers.tracked(run, folder, log):
        raise KeyError
    assert tracker.calls[-1] == "finish"
    assert log.listeners == []

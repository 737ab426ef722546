"""Checkpoints on disk: their layout stays readable, and nothing of the trainer state is lost."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import save

from trainer.errors import StateError
from trainer.runs import events, run_folder, run_requests
from trainer.training import loop, trainer_state
from trainer.training.runner import STOPPED, run_in
from trainer.training.trainer_state import Checkpoint, RunIdentity, TrainerState

FACTS = {
    "config": "c0ffee",
    "dataset": {"00.png at 32": "aa", "01.png at 32": "bb"},
    "started": 1700000000.5,
    "elapsed": 12.5,
    "loss_scale": 1024.0,
    "lr_scale": 0.5,
    "rollbacks": 1,
    "bad_steps": 2,
    "averaged_steps": 300,
    "optimizer": {
        "class": "AdamW",
        "memory": {"0": {"items": [["exp_avg", {"tensor": "0.exp_avg", "on_cpu": True}]]}},
        "groups": [{"items": [["lr", 0.01]]}],
    },
}
"""The "facts" of a state.json as version 2 has had them from its start."""
TENSORS = {
    "adapter": {"unet.x.lora_A": torch.arange(4.0)},
    "optimizer": {"0.exp_avg": torch.ones(4)},
    "average": {"unet.x.lora_A": torch.zeros(4)},
}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_old_checkpoint(folder, facts, step=300):
    """Writes the files of a checkpoint without any code of the trainer."""
    path = folder / "state" / f"{step:06d}"
    path.mkdir(parents=True)
    contents = {f"{name}.safetensors": save(tensors) for name, tensors in TENSORS.items()}
    for name, content in contents.items():
        (path / name).write_bytes(content)
    hashes = {name: sha256(content) for name, content in contents.items()}
    document = {"version": 2, "step": step, "facts": facts, "sha256": hashes}
    document["self"] = sha256(json.dumps(document, sort_keys=True).encode())
    (path / "state.json").write_text(json.dumps(document), encoding="utf-8")


def test_a_checkpoint_in_the_layout_of_earlier_versions_is_read(tmp_path):
    write_old_checkpoint(tmp_path, FACTS)
    checkpoint, warnings = trainer_state.load_checkpoint(tmp_path)
    assert not warnings
    assert checkpoint.step == 300
    assert checkpoint.optimizer_record == FACTS["optimizer"]
    identity = RunIdentity("c0ffee", FACTS["dataset"], 1700000000.5)
    assert checkpoint.state == TrainerState(identity, 12.5, 1024.0, 0.5, 1, 2, 300)
    for name in TENSORS:
        for key, tensor in TENSORS[name].items():
            assert torch.equal(getattr(checkpoint, name)[key], tensor)


def test_missing_counters_get_their_defaults(tmp_path):
    facts = {name: FACTS[name] for name in ("config", "dataset", "started", "optimizer")}
    write_old_checkpoint(tmp_path, facts)
    checkpoint, _ = trainer_state.load_checkpoint(tmp_path)
    assert checkpoint.state == TrainerState(checkpoint.state.identity)
    assert checkpoint.state.loss_scale == 2.0**16


def test_a_written_checkpoint_has_the_layout_of_earlier_versions(tmp_path):
    identity = RunIdentity("c0ffee", FACTS["dataset"], 1700000000.5)
    state = TrainerState(identity, 12.5, 1024.0, 0.5, 1, 2, 300)
    written = Checkpoint(300, *TENSORS.values(), FACTS["optimizer"], state)
    trainer_state.save_checkpoint(tmp_path, written)
    document = json.loads((tmp_path / "state" / "000300" / "state.json").read_text())
    assert document["facts"] == FACTS
    assert (document["version"], document["step"]) == (2, 300)
    own_hash = document.pop("self")
    assert own_hash == sha256(json.dumps(document, sort_keys=True).encode())
    for name, digest in document["sha256"].items():
        assert digest == sha256((tmp_path / "state" / "000300" / name).read_bytes())


def test_a_run_without_an_average_writes_no_averaged_steps(tmp_path):
    state = TrainerState(RunIdentity("", {}, 0.0))
    assert "averaged_steps" not in state.to_document()
    assert TrainerState.from_document(state.to_document()) == state


@pytest.mark.parametrize("step", [2, 3])
def test_a_checkpoint_deletes_those_of_later_steps(tmp_path, step):
    """A rollback writes a checkpoint of an earlier step."""
    state = TrainerState(RunIdentity("", {}, 0.0))
    for number in (1, 4, 5, step):
        written = Checkpoint(number, *TENSORS.values(), FACTS["optimizer"], state)
        trainer_state.save_checkpoint(tmp_path, written)
    left = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert left == [f"{step:06d}"]


@pytest.mark.parametrize("field", ["config", "dataset"])
def test_a_changed_run_is_refused(field):
    values = {"config": "a", "dataset": {"x.png": "1"}, "started": 0.0}
    other = values | {"config": "b", "dataset": {"x.png": "2"}}
    changed = RunIdentity(**(values | {field: other[field]}))
    trainer_state.check_unchanged(RunIdentity(**values), RunIdentity(**values))
    with pytest.raises(StateError, match="run.toml" if field == "config" else "x.png"):
        trainer_state.check_unchanged(RunIdentity(**values), changed)


def test_the_loss_scale_is_saved_and_restored(tiny_run, monkeypatch):
    """The scaler of fp16 would otherwise start at its default, and overflow for many steps."""
    folder = run_folder.create(tiny_run())
    initial_scales = []

    class Scaler(torch.amp.GradScaler):
        def __init__(self, device, enabled, init_scale):
            initial_scales.append(init_scale)
            super().__init__(device, enabled=enabled, init_scale=init_scale)

        def get_scale(self):
            return 512.0

    stop_after(monkeypatch, folder, 3)
    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    assert run_in(folder) == STOPPED
    checkpoint, _ = trainer_state.load_checkpoint(folder)
    assert checkpoint.state.loss_scale == 512.0
    assert run_in(folder) == 0
    assert initial_scales == [2.0**16, 512.0]


def test_elapsed_time_counts_over_restarts(tiny_run, monkeypatch):
    folder = run_folder.create(tiny_run())
    with monkeypatch.context() as patch:
        stop_after(patch, folder, 3)
        assert run_in(folder) == STOPPED
    checkpoint, _ = trainer_state.load_checkpoint(folder)
    checkpoint.state.elapsed = 5000.0
    trainer_state.save_checkpoint(folder, checkpoint)
    assert run_in(folder) == 0
    happened = events.read_events(folder / "events.jsonl")
    finished = next(event for event in happened if isinstance(event, events.Finished))
    assert 5000 < finished.seconds < 6000


def stop_after(monkeypatch, folder, step):
    """Requests a stop when a step is reported."""
    report = loop.report_finished_steps

    def reporting(session, pending, state, leave=0):
        report(session, pending, state, leave)
        happened = events.read_events(folder / "events.jsonl")
        steps = [event.step for event in happened if isinstance(event, events.StepDone)]
        if steps == list(range(1, step + 1)):
            run_requests.request(folder, "stop")

    monkeypatch.setattr(loop, "report_finished_steps", reporting)

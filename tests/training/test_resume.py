"""A run that is killed and resumed gives the weights of an uninterrupted run, to the bit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.helpers import adapter_of, resumed_from, same
from trainer import config
from trainer.errors import StateError
from trainer.runs import run_folder, run_status
from trainer.training import trainer_state
from trainer.training.runner import run_in

STEPS = 10
EVERY_RANDOM_DRAW = {
    "training.steps": STEPS,
    "training.text_encoder_learning_rate": 1e-3,
    "adapter.dropout": 0.2,
    "dataset.caption_dropout": 0.3,
    "training.gradient_accumulation_steps": 2,
    "training.ema_decay": 0.9,
    "dataset.flip": True,
    "dataset.colour_jitter": 0.1,
    "dataset.variants": 3,
    "dataset.shuffle_tags": True,
    "dataset.tag_dropout": 0.3,
    "dataset.keep_tags": 0,
    "objective.noise_offset": 0.1,
    "objective.noise_offset_random": True,
    "objective.pyramid_noise": 0.2,
    "objective.input_perturbation": 0.1,
    "training.warmup": 0.2,
    "saving.state_every": 3,
    "saving.saves": 2,
    "saving.precision": "fp32",
}
"""Settings under which a run draws random numbers for everything that it can."""
KILLS = [
    [["Launched", 0]],
    [["StepDone", 1]],
    [["StepDone", 3]],
    [["StateSaved", 3], ["StepDone", 5]],
    [["StateSaved", 5]],
    [["AdapterSaved", 5]],
    [["StepDone", 8], ["StepDone", 8], ["StateSaved", 9]],
    [["SampleSaved", 10]],
    *[[["save", number]] for number in range(2, 30, 3)],
]


@pytest.mark.skipif(
    not hasattr(os, "fork"), reason="killing trainers needs fork, which Windows lacks"
)
def test_resume_after_kill_gives_identical_weights(tiny_run, tmp_path):
    run = tiny_run(EVERY_RANDOM_DRAW)
    reference = run_folder.create(run)
    killed = [run_folder.create(run) for _ in KILLS]
    folders, kills_of = [reference, *killed], [[], *KILLS]
    job = [
        {"folder": str(folder), "kills": kills}
        for folder, kills in zip(folders, kills_of, strict=True)
    ]
    train_and_kill({"runs": job}, tmp_path / "job.json")
    expected = run_status.read_status(reference)
    for folder, kills in zip(killed, KILLS, strict=True):
        status = run_status.read_status(folder)
        assert status.state == "finished", kills
        assert status.losses == expected.losses, kills
        assert status.learning_rates == expected.learning_rates, kills
        assert status.validation_losses == expected.validation_losses, kills
        assert same(adapter_of(folder), adapter_of(reference)), kills
        assert adapter_files(folder) == adapter_files(reference), kills
        if not any(kind == "save" for kind, _ in kills):
            assert not list(folder.glob("**/.writing-*")), kills


def train_and_kill(job, path):
    """Runs tests/killer.py in another process."""
    path.write_text(json.dumps(job))
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, str(root / "tests" / "killer.py"), str(path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]


def adapter_files(folder):
    return sorted(path.name for path in folder.glob("*.safetensors"))


@pytest.fixture
def finished(train_tiny):
    """A run with checkpoints of steps 4 and 6, which can be resumed from either."""
    return train_tiny({"training.steps": 6, "saving.state_every": 2})


def flip_middle_byte(content):
    changed = bytearray(content)
    changed[len(content) // 2] ^= 255
    return bytes(changed)


DAMAGES = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "flipped": flip_middle_byte,
}


@pytest.mark.parametrize(
    "name", ["adapter.safetensors", "optimizer.safetensors", "average.safetensors", "state.json"]
)
@pytest.mark.parametrize("damage", ["missing", *DAMAGES])
def test_a_damaged_checkpoint_is_skipped_for_an_older_one(finished, name, damage):
    path = finished / "state" / "000006" / name
    adapter = adapter_of(finished)
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert resumed_from(finished) == (0, 4)
    warnings = run_status.read_status(finished).warnings
    assert any("step 6 is damaged" in warning for warning in warnings)
    assert same(adapter_of(finished), adapter)


def test_without_a_whole_checkpoint_the_run_starts_over(finished):
    for folder in (finished / "state").iterdir():
        (folder / "state.json").unlink()
    assert resumed_from(finished) == (0, 0)


def test_resuming_with_changed_settings_is_refused(finished):
    run = config.load(finished / "run.toml")
    changed = config.replace(run, {"training.learning_rate": 5e-4})
    (finished / "run.toml").write_text(config.to_toml(changed))
    assert run_in(finished) == 1
    message = run_status.read_status(finished).message
    assert "settings in run.toml were changed" in message


def test_resuming_with_a_changed_dataset_names_the_image(tiny_run, tiny_dataset, tmp_path):
    dataset = shutil.copytree(tiny_dataset, tmp_path / "copy")
    folder = run_folder.create(tiny_run({"dataset.folder": str(dataset)}))
    assert run_in(folder) == 0
    (dataset / "01.txt").write_text("another caption")
    assert run_in(folder) == 1
    assert "01.png" in run_status.read_status(folder).message


def test_a_checkpoint_with_other_modules_is_refused():
    parameters = {"a": torch.nn.Parameter(torch.zeros(1))}
    with pytest.raises(StateError, match="other modules"):
        trainer_state.restore_parameters(parameters, {"b": torch.zeros(1)})


def test_two_checkpoints_stay_and_none_contains_pickle(finished):
    folders = sorted(path.name for path in (finished / "state").iterdir())
    assert folders == ["000004", "000006"]
    files = [path for path in (finished / "state").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}

"""A run that was killed and resumed is the run that was not: bit for bit on a CPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trainer import config
from trainer.errors import StateError
from trainer.runs import run_folder, run_status
from trainer.training import trainer_state
from trainer.training.runner import run_in

STEPS = 10
HARD = {
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
    reference = run_folder.create(tiny_run(HARD))
    folders = [run_folder.create(tiny_run(HARD)) for _ in KILLS]
    job = tmp_path / "job.json"
    job.write_text(
        json.dumps(
            {
                "runs": [
                    {"folder": str(reference), "kills": []},
                    *({"folder": str(f), "kills": k} for f, k in zip(folders, KILLS, strict=True)),
                ]
            }
        )
    )
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    ended = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "killer.py"), str(job)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    expected = run_status.read_status(reference)
    for folder, kills in zip(folders, KILLS, strict=True):
        status = run_status.read_status(folder)
        assert status.state == "finished", kills
        assert (
            status.losses == expected.losses
            and status.learning_rates == expected.learning_rates
            and status.validation_losses == expected.validation_losses
        ), kills
        ours, theirs = (
            load_file(folder / status.finished.file),
            load_file(reference / expected.finished.file),
        )
        assert ours.keys() == theirs.keys() and all(
            torch.equal(ours[name], theirs[name]) for name in ours
        ), kills
        assert not list(folder.glob("**/.writing-*")) or any(kind == "save" for kind, _ in kills)
        assert sorted(p.name for p in folder.glob("*.safetensors")) == sorted(
            p.name for p in reference.glob("*.safetensors")
        )


@pytest.fixture
def stopped(train_tiny):
    """A finished run whose end is forgotten: two states, ready to be resumed from the older or the newer."""
    return train_tiny({"training.steps": 6, "saving.state_every": 2})


def resumed_from(folder):
    before = len((folder / "events.jsonl").read_bytes())
    code = run_in(folder)
    lines = (folder / "events.jsonl").read_bytes()[before:].splitlines()
    started = [json.loads(line) for line in lines if b'"Started"' in line]
    return code, started[0]["step"] if started else None


@pytest.mark.parametrize(
    "name", ["adapter.safetensors", "optimizer.safetensors", "average.safetensors", "state.json"]
)
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "flipped"])
def test_a_damaged_checkpoint_is_skipped_for_an_older_one(stopped, name, damage):
    path = stopped / "state" / "000006" / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        middle = len(content) // 2
        path.write_bytes(
            {
                "empty": b"",
                "half": content[:middle],
                "flipped": content[:middle]
                + bytes([content[middle] ^ 255])
                + content[middle + 1 :],
            }[damage]
        )
    adapter = load_file(stopped / "tiny.safetensors")
    assert resumed_from(stopped) == (0, 4)
    status = run_status.read_status(stopped)
    assert any("step 6 is damaged" in warning for warning in status.warnings)
    again = load_file(stopped / "tiny.safetensors")
    assert all(torch.equal(adapter[key], again[key]) for key in adapter)


def test_without_a_whole_checkpoint_the_run_starts_over(stopped):
    for folder in (stopped / "state").iterdir():
        (folder / "state.json").unlink()
    assert resumed_from(stopped) == (0, 0)


def test_resuming_with_changed_settings_is_refused(stopped):
    run = config.load(stopped / "run.toml")
    (stopped / "run.toml").write_text(
        config.to_toml(config.replace(run, {"training.learning_rate": 5e-4}))
    )
    assert (
        run_in(stopped) == 1
        and "settings in run.toml were changed" in run_status.read_status(stopped).message
    )


def test_resuming_with_a_changed_dataset_names_the_image(tiny_run, tiny_dataset, tmp_path):
    dataset = shutil.copytree(tiny_dataset, tmp_path / "copy")
    folder = run_folder.create(tiny_run({"dataset.folder": str(dataset)}))
    assert run_in(folder) == 0
    (dataset / "01.txt").write_text("another caption")
    assert run_in(folder) == 1 and "01.png" in run_status.read_status(folder).message


def test_a_checkpoint_with_other_modules_is_refused():
    with pytest.raises(StateError, match="other modules"):
        trainer_state.restore_parameters(
            {"a": torch.nn.Parameter(torch.zeros(1))}, {"b": torch.zeros(1)}
        )


def test_two_checkpoints_stay_and_none_contains_pickle(stopped):
    files = [path for path in (stopped / "state").rglob("*") if path.is_file()]
    assert len(list((stopped / "state").iterdir())) == 2 and {path.suffix for path in files} == {
        ".safetensors",
        ".json",
    }

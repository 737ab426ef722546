"""Distributed training: two processes learn what one learns, and survive the loss of a rank."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.training.helpers import adapter_of, events_of
from trainer import config
from trainer.errors import ConfigError
from trainer.runs import events, run_folder, run_requests, run_status
from trainer.training import distributed, launch
from trainer.training.runner import STOPPED, run_in

ROOT = Path(__file__).parents[2]
SHORT = {
    "name": "tiny",
    "dataset.resolution": 32,
    "dataset.bucket_step": 8,
    "training.steps": 6,
    "training.learning_rate": 1e-2,
    "training.warmup": 0.0,
    "adapter.rank": 2,
    "saving.saves": 2,
    "saving.state_every": 2,
    "sampling.inference_steps": 1,
    "sampling.prompts": ["a"],
}
TWO_MICROBATCHES = {
    "training.batch_size": 2,
    "training.gradient_accumulation_steps": 2,
    "saving.precision": "fp32",
    "training.ema_decay": 0.9,
    "adapter.dropout": 0.2,
    "training.text_encoder_learning_rate": 1e-3,
    "training.text_encoder_until": 0.5,
}
ONE_MICROBATCH = {
    "training.batch_size": 3,
    "training.gradient_accumulation_steps": 1,
    "dataset.repeats": [". = 2"],
    "saving.precision": "fp32",
    "training.ema_decay": 0.9,
}


class Plan(NamedTuple):
    """A run and how often it is started: (processes, (rank to kill, moment, step) or None)."""

    changes: dict
    starts: list


PLANS = {
    "one": Plan(TWO_MICROBATCHES, [(1, None)]),
    "two": Plan(TWO_MICROBATCHES, [(2, None)]),
    "split by one": Plan(ONE_MICROBATCH, [(1, None)]),
    "split by three": Plan(ONE_MICROBATCH, [(3, None)]),
    "rank 1 killed": Plan(
        TWO_MICROBATCHES | {"saving.state_every": 100, "saving.saves": 1},
        [(2, (1, "gradients", 4)), (1, None)],
    ),
    "rank 0 killed": Plan(TWO_MICROBATCHES, [(2, (0, "event", 5)), (2, None)]),
    "too many": Plan(
        {"training.batch_size": 1, "training.gradient_accumulation_steps": 1}, [(2, None)]
    ),
}


class Trained(NamedTuple):
    folder: Path
    codes: list
    """The exit codes of all ranks, for each start."""


@pytest.fixture(scope="module")
def trained(tiny_base, tiny_dataset, tmp_path_factory):
    """Trains every plan in a process that imports the libraries once and forks."""
    outputs = tmp_path_factory.mktemp("several")
    paths = {"base.model": str(tiny_base), "dataset.folder": str(tiny_dataset)}
    folders = {}
    for name, plan in PLANS.items():
        run = config.replace(config.RunConfig(), SHORT | paths | plan.changes)
        folders[name] = run_folder.create(run, outputs / "runs")
    job = [
        {"folder": str(folders[name]), "processes": processes, "kill": kill}
        for name, plan in PLANS.items()
        for processes, kill in plan.starts
    ]
    (outputs / "job.json").write_text(json.dumps(job))
    write_accelerate_config(outputs)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "ATELIER_OUTPUTS": str(outputs),
        "HF_HOME": str(outputs),
    }
    ended = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "ranks.py"), str(outputs / "job.json")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = iter([json.loads(line) for line in ended.stdout.splitlines() if line.startswith("[")])
    return {
        name: Trained(folders[name], [next(lines) for _ in plan.starts])
        for name, plan in PLANS.items()
    }


def write_accelerate_config(home):
    """Writes what `accelerate config` leaves on a machine, which must not be read."""
    path = home / "accelerate" / "default_config.yaml"
    path.parent.mkdir()
    path.write_text("distributed_type: MULTI_GPU\nnum_processes: 8\nmixed_precision: fp16\n")


needs_fork = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="the processes of these tests are forks, which Windows lacks"
)


def assert_same_training(one, other, tolerance):
    """Compares the losses of all steps, the validation losses and the final adapters."""
    ours, theirs = run_status.read_status(one), run_status.read_status(other)
    assert ours.state == theirs.state == "finished"
    for mine, other_losses in (
        (ours.losses, theirs.losses),
        (ours.validation_losses, theirs.validation_losses),
    ):
        assert [step for step, _ in mine] == [step for step, _ in other_losses]
        losses = [loss for _, loss in other_losses]
        assert [loss for _, loss in mine] == pytest.approx(losses, rel=tolerance, abs=0)
    a, b = adapter_of(one), adapter_of(other)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


def started_steps(folder):
    return [event.step for event in events_of(folder, events.Started)]


@needs_fork
def test_two_processes_give_the_weights_of_one_to_the_bit(trained):
    """Each has one of two microbatches, so there is one order of summation.

    The run has dropout, and a text encoder that stops halfway.
    """
    assert_same_training(trained["two"].folder, trained["one"].folder, 0.0)


@needs_fork
def test_a_split_microbatch_gives_the_same_weights_up_to_rounding(trained):
    """Three processes share three images, and fewer in the last batch of a shape."""
    split = trained["split by three"].folder
    assert run_status.read_status(split).started.device.startswith("3 x ")
    assert_same_training(split, trained["split by one"].folder, 1e-4)


@needs_fork
def test_only_rank_0_writes(trained):
    def kinds(name):
        found = events_of(trained[name].folder)
        names = [type(event).__name__ for event in found]
        return [kind for kind in names if kind != "Progress"]

    def files(name):
        folder = trained[name].folder
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))

    assert trained["two"].codes == [[0, 0]]
    assert kinds("two") == kinds("one")
    assert kinds("two").count("StepDone") == 6
    assert files("two") == files("one")
    assert not any(".writing-" in name for name in files("two"))


@needs_fork
def test_a_killed_rank_ends_the_run_with_a_checkpoint_of_the_last_whole_step(trained):
    folder, codes = trained["rank 1 killed"]
    assert codes == [[1, -signal.SIGKILL], [0]]
    (failed,) = events_of(folder, events.Failed)
    assert "One of the 2 processes" in failed.message
    assert "Resume" in failed.message
    assert started_steps(folder) == [0, 3], "resumed by one process"
    losses = run_status.read_status(folder).losses
    assert losses == run_status.read_status(trained["one"].folder).losses


@needs_fork
def test_when_rank_0_is_killed_the_run_resumes_from_its_last_checkpoint(trained):
    folder, codes = trained["rank 0 killed"]
    assert codes == [[-signal.SIGKILL, 1], [0, 0]]
    assert started_steps(folder) == [0, 4]
    assert_same_training(folder, trained["one"].folder, 0.0)


@needs_fork
def test_more_processes_than_images_in_a_step_are_refused(trained):
    folder, codes = trained["too many"]
    assert codes == [[1, 1]]
    message = run_status.read_status(folder).message
    assert "2 processes cannot share a step of 1 images" in message


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("microbatches", [1, 2, 3, 4, 8])
def test_every_share_of_a_step_is_assigned_once(size, microbatches):
    by_rank = [distributed.World(rank, size).shares(microbatches) for rank in range(size)]
    shares = sorted(share for of_rank in by_rank for share in of_rank)
    pieces = shares[0][2]
    expected = [(part, piece, pieces) for part in range(microbatches) for piece in range(pieces)]
    assert shares == expected
    assert {len(of_rank) for of_rank in by_rank} == {microbatches * pieces // size}
    if microbatches % size == 0:
        assert pieces == 1


def test_more_devices_than_images_in_a_step_are_refused():
    with pytest.raises(ConfigError, match="cannot share a step of 2"):
        config.replace(config.RunConfig(), {"training.devices": 4, "training.batch_size": 2})


def test_a_run_can_be_resumed_with_another_number_of_devices():
    one, two = (
        config.replace(config.RunConfig(), {"training.devices": count, "training.batch_size": 2})
        for count in (1, 2)
    )
    assert config.fingerprint(one) == config.fingerprint(two)


@needs_fork
def test_the_file_of_accelerate_config_is_ignored(trained):
    for name in ("one", "two"):
        started = run_status.read_status(trained[name].folder).started
        assert started.precision == "fp32"
        assert not started.device.startswith("8 x")


def test_a_run_on_two_devices_starts_two_processes_and_can_be_stopped(tiny_run, capfd):
    """The page and the command line start a run on several devices with one command."""
    endless = {"training.steps": 100_000, "saving.saves": 1, "saving.state_every": 100_000}
    folder = run_folder.create(tiny_run({"training.devices": 2} | endless))
    handlers = [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)]

    def stop_after_two_steps():
        deadline = time.monotonic() + 240
        while run_status.read_status(folder).step < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        run_requests.request(folder, "stop")

    thread = threading.Thread(target=stop_after_two_steps)
    thread.start()
    code = run_in(folder)
    thread.join()
    log = capfd.readouterr().err
    status = run_status.read_status(folder)
    assert status.state == "stopped", log[-2000:]
    assert status.started.device.startswith("2 x CPU")
    assert (folder / "tiny.safetensors").is_file()
    assert code == STOPPED
    assert "FAILED" not in log
    assert [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_stop_while_several_processes_load_counts(tiny_run, monkeypatch):
    """Loading takes half a minute, in which Ctrl-C must end the run too."""
    folder = run_folder.create(tiny_run({"training.devices": 2}))
    run_requests.request(folder, "stop")  # from before the run was resumed
    old_stops = []

    def start(count, folder):
        old_stops.append(run_requests.requested(folder, "stop"))
        os.kill(os.getpid(), signal.SIGTERM)
        with monkeypatch.context() as rank_0:
            rank_0.setenv(launch.STARTED, "1")
            rank_0.setattr(launch, "is_one_of_several", lambda: True)
            return run_in(folder, distributed.World())

    monkeypatch.setattr(launch, "start_several", start)
    assert run_in(folder) == STOPPED
    assert old_stops == [False]
    assert run_status.read_status(folder).step == 0

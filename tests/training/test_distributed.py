"""Two processes that train as one learn what one process learns, write each file once, and end with a state when one of them dies."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trainer import config
from trainer.errors import ConfigError
from trainer.runs import events, run_folder, run_requests, run_status
from trainer.training import distributed, launch
from trainer.training.runner import STOPPED, run_in

ROOT = Path(__file__).parents[2]
SHARED = {
    "training.batch_size": 2,
    "training.gradient_accumulation_steps": 2,
    "saving.precision": "fp32",
    "training.ema_decay": 0.9,
}
DROPPING = {
    "adapter.dropout": 0.2,
    "training.text_encoder_learning_rate": 1e-3,
    "training.text_encoder_until": 0.5,
}
CUT = SHARED | {
    "training.batch_size": 3,
    "training.gradient_accumulation_steps": 1,
    "dataset.repeats": [". = 2"],
}


@pytest.fixture(scope="module")
def trained(tiny_base, tiny_dataset, tmp_path_factory):
    """Every run of this file, trained by one process that forks: {name: (folder, [lines of exit codes])}."""
    outputs = tmp_path_factory.mktemp("several")
    plan = {
        "one": (SHARED | DROPPING, [(1, None)]),
        "two": (SHARED | DROPPING, [(2, None)]),
        "cut one": (CUT, [(1, None)]),
        "cut three": (CUT, [(3, None)]),
        "lost": (
            SHARED | DROPPING | {"saving.state_every": 100, "saving.saves": 1},
            [(2, (1, "gradients", 4)), (1, None)],
        ),
        "headless": (SHARED | DROPPING, [(2, (0, "event", 5)), (2, None)]),
        "too many": (
            SHARED | {"training.batch_size": 1, "training.gradient_accumulation_steps": 1},
            [(2, None)],
        ),
    }
    short = {
        "name": "tiny", "base.model": str(tiny_base), "dataset.folder": str(tiny_dataset), "dataset.resolution": 32,
        "dataset.bucket_step": 8, "training.steps": 6, "training.learning_rate": 1e-2, "training.warmup": 0.0, "adapter.rank": 2,
        "saving.saves": 2, "saving.state_every": 2, "sampling.inference_steps": 1, "sampling.prompts": ["a"],
    }  # fmt: skip
    folders = {
        name: run_folder.create(
            config.replace(config.RunConfig(), short | changes), outputs / "runs"
        )
        for name, (changes, _) in plan.items()
    }
    job = [
        {"folder": str(folders[name]), "processes": processes, "kill": kill}
        for name, (_, lives) in plan.items()
        for processes, kill in lives
    ]
    (outputs / "job.json").write_text(json.dumps(job))
    left = (
        outputs / "accelerate" / "default_config.yaml"
    )  # by `accelerate config`, and not to be read
    left.parent.mkdir()
    left.write_text("distributed_type: MULTI_GPU\nnum_processes: 8\nmixed_precision: fp16\n")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "ATELIER_OUTPUTS": str(outputs),
        "HF_HOME": str(outputs),
    }
    ended = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "ranks.py"), str(outputs / "job.json")],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = iter([json.loads(line) for line in ended.stdout.splitlines() if line.startswith("[")])
    return {
        name: (folders[name], [next(lines) for _ in lives]) for name, (_, lives) in plan.items()
    }


needs_fork = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="the processes of these tests are forks, which Windows lacks"
)


def all_events(folder):
    return list(events.read_events(folder / "events.jsonl"))


def alike(one, other, tolerance):
    """Losses of every step, validation losses, and the final adapter."""
    ours, theirs = run_status.read_status(one), run_status.read_status(other)
    assert ours.state == theirs.state == "finished" and [step for step, _ in ours.losses] == [
        step for step, _ in theirs.losses
    ]
    for mine, yours in zip(
        ours.losses + ours.validation_losses, theirs.losses + theirs.validation_losses, strict=True
    ):
        assert mine[1] == pytest.approx(yours[1], rel=tolerance)
    a, b = load_file(one / ours.finished.file), load_file(other / theirs.finished.file)
    assert a.keys() == b.keys() and all(
        torch.allclose(a[name], b[name], rtol=tolerance, atol=tolerance) for name in a
    )


@needs_fork
def test_two_processes_give_the_weights_of_one_to_the_bit(trained):
    """Two microbatches a step, one for each: their sum has one order only. With dropout, and a text encoder that stops half way."""
    alike(trained["two"][0], trained["one"][0], 0.0)


@needs_fork
def test_a_split_microbatch_gives_the_same_weights_up_to_rounding(trained):
    """Three processes, three pictures in a microbatch, fewer in the last one of a shape: some process then has nothing to do."""
    assert run_status.read_status(trained["cut three"][0]).started.device.startswith("3 x ")
    alike(trained["cut three"][0], trained["cut one"][0], 1e-4)


@needs_fork
def test_only_rank_0_writes(trained):
    one, two = (all_events(trained[name][0]) for name in ("one", "two"))
    kinds = [
        [type(event).__name__ for event in found if not isinstance(event, events.Progress)]
        for found in (one, two)
    ]
    assert (
        kinds[0] == kinds[1] and kinds[1].count("StepDone") == 6 and trained["two"][1] == [[0, 0]]
    )
    files = [
        sorted(
            path.relative_to(trained[name][0]).as_posix() for path in trained[name][0].rglob("*")
        )
        for name in ("one", "two")
    ]
    assert files[0] == files[1] and not any(".writing-" in name for name in files[1])


@needs_fork
def test_a_killed_rank_ends_the_run_with_a_checkpoint_of_the_last_whole_step(trained):
    folder, codes = trained["lost"]
    assert codes == [[1, -signal.SIGKILL], [0]]
    found = all_events(folder)
    failed = next(event for event in found if isinstance(event, events.Failed))
    assert "One of the 2 processes" in failed.message and "Resume" in failed.message
    assert [event.step for event in found if isinstance(event, events.Started)] == [
        0,
        3,
    ]  # resumed by one process
    assert run_status.read_status(folder).losses == run_status.read_status(trained["one"][0]).losses


@needs_fork
def test_when_rank_0_is_killed_the_run_resumes_from_its_last_checkpoint(
    trained,
):
    folder, codes = trained["headless"]
    assert codes == [[-signal.SIGKILL, 1], [0, 0]]
    assert [event.step for event in all_events(folder) if isinstance(event, events.Started)] == [
        0,
        4,
    ]
    alike(folder, trained["one"][0], 0.0)


@needs_fork
def test_more_processes_than_images_in_a_step_are_refused(trained):
    folder, codes = trained["too many"]
    assert (
        codes == [[1, 1]]
        and "cannot share a step of 1 images" in run_status.read_status(folder).message
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("microbatches", [1, 2, 3, 4, 8])
def test_every_share_of_a_step_is_assigned_once(size, microbatches):
    shares = [distributed.World(rank, size).shares(microbatches) for rank in range(size)]
    every = sorted(share for shares_of_one in shares for share in shares_of_one)
    pieces = every[0][2]
    assert every == [
        (part, piece, pieces) for part in range(microbatches) for piece in range(pieces)
    ]
    assert {len(shares_of_one) for shares_of_one in shares} == {microbatches * pieces // size}
    assert pieces == 1 or microbatches % size


def test_more_devices_than_images_in_a_step_are_refused():
    with pytest.raises(ConfigError, match="cannot share a step of 2 images"):
        config.replace(config.RunConfig(), {"training.devices": 4, "training.batch_size": 2})


def test_a_run_can_be_resumed_with_another_number_of_devices():
    one, two = (
        config.replace(config.RunConfig(), {"training.devices": n, "training.batch_size": 2})
        for n in (1, 2)
    )
    assert config.fingerprint(one) == config.fingerprint(two)


@needs_fork
def test_the_file_of_accelerate_config_is_ignored(trained):
    started = [run_status.read_status(trained[name][0]).started for name in ("one", "two")]
    assert [s.precision for s in started] == ["fp32", "fp32"] and not started[0].device.startswith(
        "8 x"
    )


def test_a_run_on_two_devices_starts_two_processes_and_can_be_stopped(tiny_run, capfd):
    """The whole way of the page and the command line: one command, two processes, one folder."""
    folder = run_folder.create(
        tiny_run(
            {
                "training.devices": 2,
                "training.steps": 100_000,
                "saving.saves": 1,
                "saving.state_every": 100_000,
            }
        )
    )
    before = [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)]

    def stop_after_a_step():
        until = time.monotonic() + 240
        while run_status.read_status(folder).step < 2 and time.monotonic() < until:
            time.sleep(0.2)
        run_requests.request(folder, "stop")

    thread = threading.Thread(target=stop_after_a_step)
    thread.start()
    code = run_in(folder)
    said = capfd.readouterr().err
    thread.join()
    status = run_status.read_status(folder)
    assert (
        status.state == "stopped"
        and status.started.device.startswith("2 x CPU")
        and (folder / "tiny.safetensors").is_file()
    ), said[-2000:]
    assert code == STOPPED and "FAILED" not in said
    assert [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_stop_while_several_processes_load_counts(tiny_run, monkeypatch):
    """They take half a minute to begin: Ctrl-C, or taking the run out of the queue, ends it in that time too."""
    folder, found = run_folder.create(tiny_run({"training.devices": 2})), []
    run_requests.request(folder, "stop")  # of an earlier life

    def start(count, folder):
        found.append(run_requests.requested(folder, "stop"))
        os.kill(os.getpid(), signal.SIGTERM)
        with monkeypatch.context() as process:  # the first of them
            process.setenv(launch.STARTED, "1")
            process.setattr(launch, "is_one_of_several", lambda: True)
            return run_in(folder, distributed.World())

    monkeypatch.setattr(launch, "start_several", start)
    assert run_in(folder) == STOPPED and found == [False] and run_status.read_status(folder).step == 0

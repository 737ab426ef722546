"""The number of CPU threads, its reason, and how threads wait. No test here reads a clock."""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_unet
from trainer.config import Base
from trainer.curation.autocaption import _onnx_options
from trainer.models import cpu_threads
from trainer.models.cpu_threads import (
    Threads,
    available_cores,
    cgroup_quota,
    fastest,
    use_threads_for,
)
from trainer.models.device import device_name
from trainer.runs import events, run_folder
from trainer.training.runner import run_in

CPU = torch.device("cpu")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Gives the process four cores and no variable for the threads. Restores torch's number."""
    before = torch.get_num_threads()
    for name in cpu_threads.COUNTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cpu_threads, "available_cores", lambda: 4)
    yield monkeypatch
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "read",
    ["import trainer", "from trainer import run", "import trainer.__main__", "import app.__main__"],
)
def test_the_wait_policy_is_set_before_torch_is_imported(read: str):
    ask = f"{read}; import os, sys; print('torch' in sys.modules, *map(os.environ.get, {WAITING}))"
    assert output_of(ask) == ["False", *cpu_threads.WAITING.values()]


@pytest.mark.parametrize(
    "theirs", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}, {"KMP_BLOCKTIME": "200"}]
)
def test_a_wait_policy_that_the_person_set_is_kept(theirs: dict[str, str]):
    """None of ours is added: GOMP_SPINCOUNT would overrule their OMP_WAIT_POLICY."""
    ask = f"import trainer, os; print(*map(os.environ.get, {WAITING}))"
    assert output_of(ask, theirs) == [theirs.get(name, "None") for name in WAITING]


WAITING = tuple(cpu_threads.WAITING)


def output_of(code: str, changes: dict[str, str] | None = None) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name not in WAITING} | (
        changes or {}
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def put(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n")
    return root


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, math.inf),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, math.inf),
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000",
                "sys/fs/cgroup/a/cpu.max": "300000 100000",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "0::/a",
                "sys/fs/cgroup/a/cpu.max": "300000 100000",
                "sys/fs/cgroup/cpu.max": "200000 100000",
            },
            2,
        ),
        ({"proc/self/cgroup": "0::/../../elsewhere", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "nonsense"}, math.inf),
        (
            {
                "proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/x",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/docker/abc",
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us": "100000",
            },
            math.inf,
        ),
        (
            {"proc/self/cgroup": "3:cpuset:/x", "sys/fs/cgroup/cpuset/cpu.max": "100000 100000"},
            math.inf,
        ),
    ],
)
def test_cgroup_quota_is_read_in_both_versions(tmp_path: Path, files: dict[str, str], cores: float):
    assert cgroup_quota(put(tmp_path, files)) == cores


def test_available_cores_are_the_quota_rounded_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("process_cpu_count", "cpu_count"):
        monkeypatch.setattr(os, name, lambda: 8, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert available_cores(tmp_path) == 8
    for quota, cores in (("250000", 3), ("1000", 1), ("9900000", 8)):
        assert (
            available_cores(
                put(
                    tmp_path,
                    {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": f"{quota} 100000"},
                )
            )
            == cores
        )


def test_torch_gets_no_more_threads_than_cores(free: pytest.MonkeyPatch):
    torch.set_num_threads(4)
    free.setattr(cpu_threads, "available_cores", lambda: 2)
    cpu_threads.limit_to_cores()
    assert torch.get_num_threads() == 2
    free.setenv("OMP_NUM_THREADS", "4")
    torch.set_num_threads(4)
    cpu_threads.limit_to_cores()
    assert torch.get_num_threads() == 4


def test_the_embedded_base_gets_one_thread_with_the_reason(free: pytest.MonkeyPatch):
    from trainer.families import load_base

    torch.set_num_threads(2)
    threads = use_threads_for(load_base(Base(), torch.float32).denoiser, CPU, 8)
    assert torch.get_num_threads() == threads.count == 1
    assert device_name(CPU, threads).endswith(", 1 thread: the model is small)")


def test_a_number_that_the_person_set_is_kept(free: pytest.MonkeyPatch):
    free.setenv("OMP_NUM_THREADS", "3")
    torch.set_num_threads(3)
    assert use_threads_for(torch.nn.Linear(2, 2), CPU, 8, earlier=2) == Threads(
        3, "OMP_NUM_THREADS is set"
    )
    assert (
        torch.get_num_threads() == 3
        and str(Threads(3, "OMP_NUM_THREADS is set")) == "3 threads: OMP_NUM_THREADS is set"
    )


def test_on_a_gpu_the_number_is_left_to_torch(free: pytest.MonkeyPatch):
    before = torch.get_num_threads()
    assert use_threads_for(torch.nn.Linear(2, 2), torch.device("cuda"), 8) == Threads(before)


def test_a_single_core_needs_no_measurement(free: pytest.MonkeyPatch):
    free.setattr(cpu_threads, "SMALL", 0)
    free.setattr(cpu_threads, "available_cores", lambda: 1)
    assert use_threads_for(torch.nn.Linear(2, 2), CPU, 8) == Threads(1, "the process has one core")


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({1: 4, 2: 2, 4: 1}, 4),
        ({1: 4, 2: 2, 4: 1.97}, 2),
        ({1: 1, 2: 2, 4: 3}, 1),
        ({1: 1.04, 2: 1.02, 4: 1}, 1),
        ({1: 4, 2: 5, 4: 1}, 4),
    ],
)
def test_fewer_threads_win_unless_more_are_clearly_faster(seconds: dict[int, float], best: int):
    threads = fastest([1, 2, 4], seconds.__getitem__)
    assert threads == Threads(best, "measured as the fastest of 1, 2, 4")


def test_one_disturbed_measurement_decides_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_threads, "MAX_SECONDS", math.inf)
    times = {1: iter([9, 4, 4, 1]), 2: iter([9, 2, 50, 2])}
    assert fastest([1, 2], lambda count: next(times[count])).count == 2


@pytest.mark.parametrize("kind", ["UNet", "without convolutions"])
def test_a_larger_model_is_measured_on_its_own_layers(kind: str, free: pytest.MonkeyPatch):
    """The measurement leaves no gradients."""
    free.setattr(cpu_threads, "SMALL", 0)
    model = (
        tiny_unet().requires_grad_(False)
        if kind == "UNet"
        else torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 4))
    )
    assert len(list(cpu_threads._typical_layers(model, 8))) == (2 if kind == "UNet" else 1)
    threads = use_threads_for(model, CPU, 8)
    assert threads.count in (1, 2, 4) and "measured as the fastest of 1, 2, 4" in threads.reason
    assert torch.get_num_threads() == threads.count and all(
        weight.grad is None for weight in model.parameters()
    )


def test_a_run_reports_its_threads_and_a_resumed_one_keeps_their_number(
    tiny_run: Callable, free: pytest.MonkeyPatch
):
    """Another number could change the last bits of the results."""
    free.setattr(cpu_threads, "SMALL", 0)
    free.setattr(cpu_threads, "fastest", lambda *_: Threads(2, "measured"))
    folder = run_folder.create(tiny_run())
    assert run_in(folder) == 0
    free.setattr(cpu_threads, "fastest", lambda *_: Threads(4, "measured"))
    assert run_in(folder) == 0 and torch.get_num_threads() == 2
    free.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    assert run_in(folder) == 0 and torch.get_num_threads() == 1
    free.delenv("OMP_NUM_THREADS")
    assert run_in(folder) == 0
    started = [
        event
        for event in events.read_events(folder / "events.jsonl")
        if isinstance(event, events.Started)
    ]
    assert [event.threads for event in started] == [2, 2, 1, 2]
    reasons = [
        "2 threads: measured)",
        "2 threads: as in the first start of the run)",
        "1 thread: OMP_NUM_THREADS is set)",
    ]
    assert all(
        event.device.endswith(reason)
        for event, reason in zip(started, [*reasons, reasons[1]], strict=True)
    )


def test_a_sample_uses_the_threads_for_its_base(
    tiny_base: Path, tmp_path: Path, free: pytest.MonkeyPatch
):
    from trainer.inference.request import SampleRequest
    from trainer.inference.samples import Sampler

    torch.set_num_threads(2)
    Sampler().render(
        SampleRequest(
            "a picture", str(tmp_path / "sample.png"), Base(model=str(tiny_base)), inference_steps=1
        )
    )
    assert torch.get_num_threads() == 1


def test_a_tagger_waits_without_spinning(free: pytest.MonkeyPatch):
    pytest.importorskip("onnxruntime")
    options = _onnx_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.intra_op_num_threads == available_cores()
    free.setenv("OMP_NUM_THREADS", "3")
    assert _onnx_options().intra_op_num_threads == 3

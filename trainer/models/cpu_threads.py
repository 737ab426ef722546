"""How many CPU threads a process computes with, and how they wait for each other. Without torch.

OpenMP's threads wait for each other by spinning. On idle cores that saves microseconds in each of
the thousands of parallel regions of a step. Beside other programs it burns the core that the
awaited thread needs, and a step takes ten times as long instead of twice (`benchmarks/busy.py`).
"""

import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from statistics import median
from typing import Any

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "0"}
"""Variables that OpenMP reads once, when torch loads it.

GOMP_SPINCOUNT belongs to GCC's OpenMP (Linux), KMP_BLOCKTIME to Intel's and LLVM's. 2000 turns take
a tenth of a millisecond. Without them, waking a thread at every operation of Stable Diffusion 1.5
costs a tenth of a step on idle cores. GCC's default is 300,000.
"""

COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables with which a person, or torchrun, sets the number of threads."""

SMALL = 50_000_000
"""Parameters of a denoiser whose operations are too short to share among threads.

The embedded one has 6 million, the one of Stable Diffusion 1.5 has 860 million.
"""

MIN_SPEEDUP = 1.05
"""More threads must be faster by this factor."""
ROUNDS = 3
MAX_SECONDS = 2.0
"""After this time the measurement starts no further round."""
MAX_LATENT_SIDE = 32
"""The measurement uses latents of at most this width and height."""


@dataclass(frozen=True)
class Threads:
    """A number of threads, and the reason that the run reports. The reason is empty on a GPU."""

    count: int
    reason: str = ""

    def __str__(self) -> str:
        text = f"{self.count} thread" if self.count == 1 else f"{self.count} threads"
        return f"{text}: {self.reason}" if self.reason else text


def wait_passively(environment: MutableMapping[str, str] = os.environ) -> None:
    """Makes waiting OpenMP threads sleep, unless the person has set how they wait.

    Has an effect only before torch is imported.
    """
    if not any(environment.get(name) for name in WAITING):
        environment.update(WAITING)


def set_by_person(environment: Mapping[str, str] = os.environ) -> str:
    """Returns the variable that sets the number of threads, or ""."""
    return next((name for name in COUNTS if environment.get(name)), "")


def available_cores(root: Path = Path("/")) -> int:
    """Returns how many cores this process may use, at least one.

    This is the CPU affinity, or the quota of the cgroup (rounded up) if that is smaller: a
    container with a quota still sees all cores of its machine. `root` is the folder of `proc`
    and `sys`.
    """
    cores: int | None
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        cores = os.process_cpu_count()
    elif hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count()
    return math.ceil(min(cores or 1, cgroup_quota(root)))


def cgroup_quota(root: Path) -> float:
    """Returns how many cores the cgroups (version 1 and 2) allow, or infinity without a limit."""
    quotas = [math.inf]
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        folder = PurePosixPath(*(part for part in path.split("/") if part not in ("", "..")))
        names = (controllers, "cpu") if controllers else ("", "unified")
        # A limit can be set at every level, so all parents are read.
        for mount in (root / "sys/fs/cgroup" / name for name in names):
            for group in (mount / part for part in (folder, *folder.parents)):
                quotas.append(_cores(*_read(group / "cpu.max").split()))
                quota = _read(group / "cpu.cfs_quota_us")
                quotas.append(_cores(quota, _read(group / "cpu.cfs_period_us")))
    return min(quotas)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _cores(quota: str = "", period: str = "", *_: str) -> float:
    """Returns a quota in microseconds per period as cores.

    Without a limit the quota is "max" (version 2) or -1 (version 1).
    """
    is_limit = re.fullmatch(r"[1-9]\d*", quota) and re.fullmatch(r"[1-9]\d*", period)
    return int(quota) / int(period) if is_limit else math.inf


def limit_to_cores() -> None:
    """Gives torch at most one thread per core, unless the person set their number."""
    import torch

    cores = available_cores()
    if not set_by_person() and torch.get_num_threads() > cores:
        torch.set_num_threads(cores)


def use_threads_for(model: Any, device: Any, latent_side: int, earlier: int = 0) -> Threads:
    """Sets the number of torch's threads for a loaded model, and returns it with the reason.

    A variable of the person comes first, then `earlier`: the number that an earlier start of the
    same run used, because another one may change the last bits of its results. A small model always
    gets one thread. For a larger one the number is measured.

    Args:
        model: The denoiser (`nn.Module`), with its weights as they were loaded.
        device: The device that computes. Only on a CPU anything is set.
        latent_side: Width and height of the latents.
        earlier: The number of an earlier start, or 0.
    """
    import torch

    if device.type != "cpu":
        return Threads(torch.get_num_threads())
    if name := set_by_person():
        return Threads(torch.get_num_threads(), f"{name} is set")
    threads = _choose(model, latent_side, earlier)
    torch.set_num_threads(threads.count)
    return threads


def _choose(model: Any, latent_side: int, earlier: int) -> Threads:
    if earlier:
        return Threads(earlier, "as in the first start of the run")
    if sum(weight.numel() for weight in model.parameters()) < SMALL:
        return Threads(1, "the model is small")
    cores = available_cores()
    if cores == 1:
        return Threads(1, "the process has one core")
    powers = [2**exponent for exponent in range(cores.bit_length()) if 2**exponent < cores]
    return fastest([*powers, cores], lambda count: _seconds(model, count, latent_side))


def fastest(counts: Sequence[int], seconds: Callable[[int], float]) -> Threads:
    """Measures each number of threads (ascending) several times, in turn. Returns the fastest.

    The first measurement of each is dropped, because it includes starting the threads.
    """
    began = time.monotonic()
    for count in counts:
        seconds(count)
    times: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(ROUNDS):
        for count in counts:
            times[count].append(seconds(count))
        if time.monotonic() - began > MAX_SECONDS:
            break
    best = counts[0]
    for count in counts[1:]:
        if median(times[count]) * MIN_SPEEDUP < median(times[best]):
            best = count
    return Threads(best, f"measured as the fastest of {', '.join(map(str, counts))}")


def _seconds(model: Any, count: int, latent_side: int) -> float:
    """Returns the seconds of a forward and backward pass through typical layers of the model."""
    import torch

    torch.set_num_threads(count)
    work = list(_typical_layers(model, min(MAX_LATENT_SIDE, latent_side)))
    begin = time.perf_counter()
    for layer, inputs in work:
        torch.autograd.grad(torch.nn.functional.silu(layer(inputs)).sum(), inputs)
    return time.perf_counter() - begin


def _typical_layers(model: Any, side: int) -> Iterator[tuple[Any, Any]]:
    """Yields the first linear layer and 3 x 3 convolution that keep their width, with inputs."""
    import torch

    kinds: dict[Any, Callable[[int], tuple[int, ...]]] = {
        torch.nn.Linear: lambda width: (side * side, width),
        torch.nn.Conv2d: lambda width: (width, side, side),
    }
    for kind, shape in kinds.items():
        for layer in model.modules():
            if not isinstance(layer, kind):
                continue
            outputs, inputs, *kernel = layer.weight.shape
            if outputs == inputs and kernel in ([], [3, 3]):
                dtype = layer.weight.dtype
                yield layer, torch.ones(1, *shape(inputs), dtype=dtype, requires_grad=True)
                break

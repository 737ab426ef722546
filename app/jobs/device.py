"""Which device this machine trains on and how full it is, found without torch."""

import os
import platform
import time
from dataclasses import dataclass
from functools import cache

import psutil
import pynvml

trains_elsewhere = False
"""Whether a cluster trains the runs: nothing that this machine lacks then stands in their way."""


@dataclass(frozen=True)
class Usage:
    """Bytes of memory and share of time at work. `total` 0: not known."""

    total: int
    used: int
    busy: float

    @property
    def free(self) -> int:
        return self.total - self.used


@cache
def _gpu() -> object | None:
    """The first NVIDIA GPU that a training would take, or None."""
    try:
        pynvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
        if visible in ("", "-1"):
            return None
        return (
            pynvml.nvmlDeviceGetHandleByIndex(int(visible))
            if visible.isdigit()
            else pynvml.nvmlDeviceGetHandleByUUID(visible)
        )
    except pynvml.NVMLError:
        return None


def has_cuda() -> bool:
    return _gpu() is not None


@cache
def count() -> int:
    """How many devices a training may use at once; 1 where there is no NVIDIA GPU."""
    if _gpu() is None:
        return 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return len(visible.split(",")) if visible.strip() else int(pynvml.nvmlDeviceGetCount())


def kind() -> str:
    """ "cuda" or "cpu", as `trainer.estimate` counts."""
    return "cuda" if has_cuda() else "cpu"


def usage() -> Usage:
    """Of the training device now: the GPU's memory, else that of the machine."""
    if (gpu := _gpu()) is not None:
        try:
            memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
            return Usage(
                int(memory.total),
                int(memory.used),
                pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
            )
        except pynvml.NVMLError:  # such as a card that tells no utilisation
            return Usage(0, 0, 0.0)
    return host()


def host() -> Usage:
    memory = psutil.virtual_memory()
    return Usage(memory.total, memory.total - memory.available, psutil.cpu_percent(None) / 100)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def describe() -> str:
    if (gpu := _gpu()) is not None:
        name = pynvml.nvmlDeviceGetName(gpu)
        return f"{name} · {round(pynvml.nvmlDeviceGetMemoryInfo(gpu).total / 2**30)} GB"
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return "Apple GPU"
    return "CPU · slow, good for trying out"


_measured: tuple[float, Usage, Usage] | None = None
MEASURED_FOR = 2.0  # seconds; a number that moves each tick would be sent each tick


def measured() -> tuple[Usage, Usage]:
    """Device and host, measured every other second."""
    global _measured
    now = time.monotonic()
    if _measured is None or now - _measured[0] > MEASURED_FOR:
        _measured = (now, usage(), host())
    return _measured[1:]

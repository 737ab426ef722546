"""Which device this machine trains on and how busy it is, without torch."""

import os
import platform
from dataclasses import dataclass
from functools import cache
from typing import Any

import psutil
import pynvml

from app.jobs.ttl_cache import ttl_cached
from trainer.models.cpu_threads import available_cores

trains_elsewhere = False
"""Whether a cluster trains the runs. This machine's memory and GPUs are then not checked."""

MEASURED_FOR = 2.0
"""Seconds between two measurements. Every number that changes is sent to each open page."""


@dataclass(frozen=True)
class Usage:
    """Memory in bytes, and the utilisation from 0 to 1. A `total` of 0 means unknown."""

    total: int
    used: int
    busy: float

    @property
    def free(self) -> int:
        return self.total - self.used


@cache
def _gpu() -> Any | None:
    """Returns the handle of the first NVIDIA GPU that a training would use, or None."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if visible in ("", "-1"):
        return None
    try:
        pynvml.nvmlInit()
        if visible.isdigit():
            return pynvml.nvmlDeviceGetHandleByIndex(int(visible))
        return pynvml.nvmlDeviceGetHandleByUUID(visible)
    except pynvml.NVMLError:
        return None


def has_cuda() -> bool:
    """Returns whether trainings use an NVIDIA GPU."""
    return _gpu() is not None


@cache
def count() -> int:
    """Returns how many devices a training may use at once, 1 without an NVIDIA GPU."""
    if _gpu() is None:
        return 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if visible.strip():
        return len(visible.split(","))
    return int(pynvml.nvmlDeviceGetCount())


def kind() -> str:
    """Returns "cuda" or "cpu", the names that `trainer.training.estimate` uses."""
    return "cuda" if has_cuda() else "cpu"


def usage() -> Usage:
    """Returns the present usage of the GPU, or of the machine without a GPU."""
    gpu = _gpu()
    if gpu is None:
        return host()
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
        utilisation = pynvml.nvmlDeviceGetUtilizationRates(gpu)
    except pynvml.NVMLError:  # some cards do not report their utilisation
        return Usage(0, 0, 0.0)
    return Usage(int(memory.total), int(memory.used), utilisation.gpu / 100)


def host() -> Usage:
    """Returns the present usage of the machine's memory and processor."""
    memory = psutil.virtual_memory()
    return Usage(memory.total, memory.total - memory.available, psutil.cpu_percent(None) / 100)


def cores() -> int:
    """Returns how many processor cores this process may use."""
    return available_cores()


@cache
def describe() -> str:
    """Returns the name of the device for the page, such as "NVIDIA L4 · 24 GB"."""
    gpu = _gpu()
    if gpu is not None:
        gigabytes = round(pynvml.nvmlDeviceGetMemoryInfo(gpu).total / 2**30)
        return f"{pynvml.nvmlDeviceGetName(gpu)} · {gigabytes} GB"
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return "Apple GPU"
    return "CPU · slow, good for trying out"


@ttl_cached(MEASURED_FOR)
def measured() -> tuple[Usage, Usage]:
    """Returns the usage of the device and of the host."""
    return usage(), host()

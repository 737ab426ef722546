"""What the benchmarks of models measure with: one device, seconds that mean something there, and a file of JSON lines."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer.models.device import choose_device


def device_to_measure() -> torch.device:
    """The one that a training would take; on a CPU with one thread, whose processor seconds other programs disturb least."""
    device = choose_device()
    if device.type == "cpu":
        torch.set_num_threads(1)
    return device


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds on CUDA, the processor's on a CPU."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    begin = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - begin


def keep(row: dict[str, Any], path: Path | None) -> None:
    """Appends a row to a file of JSON lines, where one was asked for."""
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

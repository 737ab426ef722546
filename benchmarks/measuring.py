"""Shared by the benchmarks of models: the device, its clock, and a file of JSON lines."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer.models.device import choose_device


def device_to_measure() -> torch.device:
    """Returns the device of a training. A CPU gets one thread, which is disturbed least."""
    device = choose_device()
    if device.type == "cpu":
        torch.set_num_threads(1)
        # A loaded base would otherwise choose its number of threads.
        os.environ["OMP_NUM_THREADS"] = "1"
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

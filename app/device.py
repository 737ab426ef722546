"""Which device this machine trains on, found without torch."""

import platform
import shutil
import subprocess
from functools import cache


@cache
def nvidia() -> str:
    """Name and memory of the first NVIDIA GPU, else ""."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    try:
        answer = subprocess.run(
            [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    name, _, memory = answer.stdout.partition("\n")[0].rpartition(",")
    if answer.returncode != 0 or not memory.strip().isdigit():
        return ""
    return f"{name.strip()} · {round(int(memory) / 1024)} GB"


def has_cuda() -> bool:
    return bool(nvidia())


def describe() -> str:
    if has_cuda():
        return nvidia()
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return "Apple GPU"
    return "CPU · slow, good for trying out"

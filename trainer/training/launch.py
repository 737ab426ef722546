"""Whether this process is one of several that train together, and how to start them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

STARTED = "ATELIER_STARTED"
"""Environment variable of the processes that `start_several` starts."""


def is_one_of_several() -> bool:
    """Returns whether torchrun or `accelerate launch` started this process with others."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def rank() -> int:
    """Returns this process's rank in distributed training, or 0."""
    return int(os.environ.get("RANK") or 0) if is_one_of_several() else 0


def was_started_here() -> bool:
    """Returns whether `start_several` started this process.

    Then its caller has already withdrawn requests from before the run was resumed.
    """
    return STARTED in os.environ


def start_several(count: int, folder: Path) -> int:
    """Trains the run of a folder with `count` processes on this machine.

    Returns the launcher's exit code when all processes have ended. Torch's elastic launcher ends
    all processes when one fails. It runs in a new session, so Ctrl-C reaches only this process.
    """
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, os.environ.get("PYTHONPATH")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        STARTED: "1",
        # The working directory is a data folder, so nothing must be imported from it.
        "PYTHONSAFEPATH": "1",
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
        "-m",
        "trainer",
        "resume",
        str(folder),
    ]
    windows_flag = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
    detached: dict[str, Any] = {"start_new_session": True}
    if windows_flag:
        detached = {"creationflags": windows_flag}
    return subprocess.Popen(command, env=environment, **detached).wait()

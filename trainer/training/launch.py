"""Whether this process is one of several that train together, and how to start them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

STARTED = "ATELIER_STARTED"  # in the environment of the processes that `start_several` starts


def is_one_of_several() -> bool:
    """Whether torchrun or `accelerate launch` started this process beside others."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def rank() -> int:
    """Which of them it is; the first one writes."""
    return int(os.environ.get("RANK") or 0) if is_one_of_several() else 0


def was_started_here() -> bool:
    """Whether `start_several` started this process, whose caller has put aside what was asked of an earlier life of the run."""
    return STARTED in os.environ


def start_several(count: int, folder: Path) -> int:
    """Trains the run of a folder with so many processes of this machine; returns the launcher's exit code when all have ended.

    Torch's elastic launcher ends the others when one fails. It gets a session of its own, so that Ctrl-C reaches this process alone.
    """
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        STARTED: "1",
        "PYTHONSAFEPATH": "1",  # the working directory, a data folder, is no place to import from
    }
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
    ]
    windows = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
    detached: dict[str, Any] = (
        {"creationflags": windows} if windows else {"start_new_session": True}
    )
    return subprocess.Popen(
        [*launcher, "-m", "trainer", "resume", str(folder)], env=environment, **detached
    ).wait()

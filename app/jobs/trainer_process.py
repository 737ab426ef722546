"""Starts `python -m trainer` as a process that outlives the page."""

import os
import subprocess
import sys
from pathlib import Path
from typing import IO

TRAINER = "trainer"
"""The module that is run. Tests put another one here."""
PROGRAM_FOLDER = Path(__file__).resolve().parents[2]


def start(
    arguments: list[str],
    folder: Path,
    outputs: Path | None = None,
    *,
    stdin: int | None = None,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
) -> subprocess.Popen[bytes]:
    """Starts `python -m trainer ARGUMENTS` with `folder` as its working directory.

    The process has a session separate from the page, so signals to the page do not reach it.

    Args:
        arguments: The command and its options.
        folder: The working directory, usually a run folder.
        outputs: The outputs folder. None: the one that contains the run folder `folder`.
        stdin, stdout, stderr: As in `subprocess.Popen`.
    """
    environment = {**os.environ, **environment_for(outputs or folder.parents[1])}
    windows_flag = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
    # -P keeps the working directory, a data folder, out of the import path.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", TRAINER, *arguments],
        cwd=folder,
        env=environment,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        creationflags=windows_flag,
        start_new_session=not windows_flag,
    )


def environment_for(outputs: Path) -> dict[str, str]:
    """Returns the environment variables that a trainer needs, on any machine."""
    import_path = [str(PROGRAM_FOLDER), os.environ.get("PYTHONPATH")]
    return {
        "PYTHONUTF8": "1",
        "ATELIER_OUTPUTS": str(outputs),
        "PYTHONPATH": os.pathsep.join(filter(None, import_path)),
    }

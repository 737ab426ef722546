"""The run folder: everything that a run leaves on disk.

    outputs/runs/2026-11-22-maya/
      run.toml                 the settings exactly as trained
      events.jsonl             what happened, one event per line
      log.txt                  output of the trainer process
      state/                   checkpoints, from which the run resumes
      samples/000500-2.png     step 500, prompt 2
      maya-000500.safetensors  adapters saved during training
      maya.safetensors         the finished file: one of these saves
      queued | stop | pause    requests (`run_requests`)
      .lock                    held by the trainer (`run_lock`)

The page, the command line and the trainer share runs only through this folder.
"""

import os
import re
import unicodedata
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from trainer import config
from trainer.errors import StateError
from trainer.runs import events
from trainer.runs.atomic_files import atomic_write

SAMPLE_SUFFIX = ".png"
USERS_FOLDER = "users"
MAX_SLUG_BYTES = 100


def current_user() -> str:
    """Returns the name of the current user, or "" if all users share one outputs folder.

    `app.accounts` replaces this function if several people sign in.
    """
    return ""


def outputs_root() -> Path:
    """Returns $ATELIER_OUTPUTS, or `outputs` in the working directory."""
    return Path(os.environ.get("ATELIER_OUTPUTS", "outputs")).resolve()


def outputs_folder() -> Path:
    """Returns the folder with the runs, datasets and caches of the current user."""
    user = current_user()
    return outputs_root() / USERS_FOLDER / user if user else outputs_root()


def runs_folder() -> Path:
    """Returns the folder that contains the run folders of the current user."""
    return outputs_folder() / "runs"


def slug(name: str) -> str:
    """Returns a file name made from any text, or "lora" if nothing of it can be used.

    Keeps letters of any script, digits, `-` and `_`, and at most `MAX_SLUG_BYTES` bytes.
    """
    text = re.sub(r"[^\w-]+", "-", unicodedata.normalize("NFC", name)).strip("-_")
    # Decoding with "ignore" drops a character that the limit cut in two.
    cut = text.encode("utf-8", "ignore")[:MAX_SLUG_BYTES]
    return cut.decode("utf-8", "ignore").strip("-_") or "lora"


def embedding_path(adapter: Path) -> Path:
    """Returns the path of the trigger's embedding for an adapter file in any format.

    For example `maya-kohya.safetensors` -> `maya-embedding.safetensors`.
    """
    stem = re.sub("-(kohya|diffusers|peft)$", "", adapter.stem)
    return adapter.with_name(f"{stem}-embedding.safetensors")


def create(run: config.RunConfig, parent: Path | None = None) -> Path:
    """Creates a run folder with its run.toml and returns its path.

    A name that is taken gets a number, so no run is ever overwritten. Raises StateError if the
    folder cannot be created.
    """
    parent = parent or runs_folder()
    stem = f"{date.today().isoformat()}-{slug(run.name)}"
    for number in range(1, 10_000):
        folder = parent / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise StateError(
                f"Cannot create the run folder {folder}: {error.strerror}. "
                "Choose an outputs folder that you can write to, with $ATELIER_OUTPUTS."
            ) from None
        atomic_write(folder / "run.toml", config.to_toml(run))
        return folder
    raise StateError(f"Too many runs are named {stem}. Choose another name.")


def list_runs(parent: Path | None = None) -> list[Path]:
    """Returns the run folders, newest first."""
    return sorted(
        unsorted_runs(parent),
        key=lambda folder: (_created_at(folder), folder.name),
        reverse=True,
    )


def unsorted_runs(parent: Path | None = None) -> Iterator[Path]:
    """Yields the run folders in the order of the file system, without reading their files."""
    parent = parent or runs_folder()
    if not parent.is_dir():
        return
    for folder in parent.iterdir():
        if (folder / "run.toml").is_file():
            yield folder


def _created_at(folder: Path) -> float:
    """Returns the time of the first event, or of run.toml if the run was never started."""
    first = next(events.read_events(folder / "events.jsonl"), None)
    return first.time if first else (folder / "run.toml").stat().st_mtime

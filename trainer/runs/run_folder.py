"""The run folder: the only thing that the page and the trainer share.

    outputs/runs/2026-11-22-maya/
      run.toml                 the settings exactly as trained
      events.jsonl             what happened, one event a line
      log.txt                  output of the trainer process
      state/                   what resuming needs
      samples/000500-2.png     step 500, prompt 2
      maya-000500.safetensors  adapters as exported
      maya.safetensors         the chosen one
      queued | stop | pause    requests: their presence is the message; save | sample are used up

A run is alive while its trainer holds the lock; the system lets go of it however the process ends.
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

USERS = "users"


def signed_in() -> str:
    """The name of the person that asks, "" where all is one's own. The page puts another function in its place (`app/workspace.py`)."""
    return ""


def everyones_folder() -> Path:
    """$ATELIER_OUTPUTS, else `outputs` below the working directory."""
    return Path(os.environ.get("ATELIER_OUTPUTS", "outputs")).resolve()


def outputs_folder() -> Path:
    """Where runs, datasets and caches live: those of the person that asks."""
    user = signed_in()
    return everyones_folder() / USERS / user if user else everyones_folder()


def runs_folder() -> Path:
    return outputs_folder() / "runs"


def slug(name: str) -> str:
    """A file name from any text: letters of any script, digits, `-` and `_`; at most 100 bytes; never empty."""
    text = re.sub(r"[^\w-]+", "-", unicodedata.normalize("NFC", name), flags=re.UNICODE).strip("-_")
    text = text.encode("utf-8", "ignore")[:100].decode("utf-8", "ignore").strip("-_")
    return text or "lora"


def embedding_of(adapter: Path) -> Path:
    """Where the trigger's embedding of an adapter file lies: maya.safetensors -> maya-embedding.safetensors, for every dialect of it."""
    return adapter.with_name(
        re.sub("-(kohya|diffusers|peft)$", "", adapter.stem) + "-embedding.safetensors"
    )


def create(run: config.RunConfig, parent: Path | None = None) -> Path:
    """Makes a new run folder with its run.toml. A name used before gets a number: nothing is ever overwritten."""
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
                f"The run folder {folder} cannot be made: {error.strerror}. Choose a place that can be written to."
            ) from None
        atomic_write(folder / "run.toml", config.to_toml(run))
        return folder
    raise StateError(f"There are too many runs named {stem}; choose another name.")


def list_runs(parent: Path | None = None) -> list[Path]:
    """Run folders, newest first (by the date in their name, then by their number)."""
    return sorted(
        any_order(parent), key=lambda folder: (_created(folder), folder.name), reverse=True
    )


def any_order(parent: Path | None = None) -> Iterator[Path]:
    """Run folders as the disk has them: a look at thousands reads no file of theirs."""
    parent = parent or runs_folder()
    if parent.is_dir():
        yield from (folder for folder in parent.iterdir() if (folder / "run.toml").is_file())


def _created(folder: Path) -> float:
    first = next(events.read_events(folder / "events.jsonl"), None)
    return first.time if first else (folder / "run.toml").stat().st_mtime

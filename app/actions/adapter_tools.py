"""What the Library does with an adapter file: describe it, and make another file from it.

`python -m trainer info | convert | resize | compose --json` does the work in another process,
because the page does not import torch.
"""

import json
import secrets
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.actions.records import AdapterDescription, BrowserData, MadeFile, ToolProgress
from app.jobs import runs, trainer_process
from app.views import files, formatting
from trainer.errors import StateError
from trainer.runs import run_folder

FORMATS = ("kohya", "diffusers")
PRECISIONS = ("fp16", "bf16", "fp32")
MAX_JOBS = 2
"""Jobs at once, of all persons together. Each has a torch process in memory."""
MAX_RANK = 512
MAX_STRENGTH = 4
MAX_FILES = 1000


@dataclass(frozen=True)
class Job:
    """A tool at work."""

    run: Path
    process: subprocess.Popen[bytes]
    output: Path
    """The file with the lines that the tool prints."""
    target: Path | None
    """The file that the tool makes, if any."""


_jobs: dict[str, Job] = {}


def look(run_id: object) -> str:
    """Starts describing the adapter of a run. Returns the id of the job."""
    folder = runs.resolve(run_id)
    return _start(folder, ["info", str(adapter_of(folder)), "--ranks", "--json"], None)


def make(run_id: object, options: BrowserData) -> str:
    """Starts making a file from the adapter of a run. Returns the id of the job.

    Args:
        run_id: The run.
        options: "dialect" (the format) and "precision" of the new file, its "rank" (0 keeps the
            rank), and the run of an "other" adapter to add, with "own_strength" and
            "other_strength".

    Raises StateError if an option is wrong, or if too many jobs are at work.
    """
    folder = runs.resolve(run_id)
    source = adapter_of(folder)
    dialect = _one_of(options, "dialect", FORMATS, "format")
    precision = _one_of(options, "precision", PRECISIONS, "precision")
    rank = _rank(options.get("rank"))
    size = ["--rank", str(rank)] if rank else []
    if options.get("other"):
        other = adapter_of(runs.resolve(options["other"]))
        own_weight = _strength(options.get("own_strength"))
        other_weight = _strength(options.get("other_strength"))
        command = ["compose", "--adapter", f"{source}:{own_weight}"]
        command += ["--adapter", f"{other}:{other_weight}", *size]
        stem = f"{source.stem}+{other.stem}"
    elif rank:
        command = ["resize", str(source), *size]
        stem = f"{source.stem}-rank{rank}"
    else:
        command = ["convert", str(source)]
        stem = f"{source.stem}-{dialect}-{precision}"
    target = _unused_file(folder, run_folder.slug(stem))
    command += ["--to", dialect, "--precision", precision, "--output", str(target), "--json"]
    return _start(folder, command, target)


def shrink(run_id: object, rank: object) -> str:
    """Starts making a smaller file in the format of the adapter. Returns the id of the job."""
    folder = runs.resolve(run_id)
    try:
        learned = json.loads((folder / "learned.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise StateError(
            "The rank that this adapter uses is not known; choose a rank under Tools in the "
            "Library."
        ) from None
    options = {
        "dialect": learned.get("dialect"),
        "precision": learned.get("precision"),
        "rank": rank,
    }
    return make(run_id, options)


def state(job_id: object) -> ToolProgress | AdapterDescription | MadeFile:
    """Returns the progress of a job, or its result once it is done. The job is then forgotten.

    Raises StateError with the message of a tool that failed, or if the job is unknown.
    """
    job = _jobs.get(str(job_id))
    if job is None:
        raise StateError("This result is not known any more; start the tool again.")
    lines = _lines(job.output)
    messages = [message for line in lines if isinstance(message := _parsed(line), dict)]
    last = messages[-1] if messages else {}
    if job.process.poll() is None:
        return {"progress": last.get("progress", [0, 0])}
    del _jobs[str(job_id)]
    job.output.unlink(missing_ok=True)
    if job.process.returncode or not messages:
        raise StateError(_reason(lines))
    if job.target is None:
        return {"facts": last}
    return {
        "file": {
            "name": job.target.name,
            "href": files.href(job.run, job.target.name),
            "size": formatting.file_size(job.target.stat().st_size),
        },
        "kept": last.get("kept_energy", ""),
        "worst": last.get("worst_module", ""),
    }


def adapter_of(folder: Path) -> Path:
    """Returns the adapter file of a run. Raises StateError if the run has none."""
    file = files.adapter_file(folder, runs.status(folder))
    if file is None:
        raise StateError("This run has no adapter yet.")
    return folder / file["name"]


def _start(folder: Path, arguments: list[str], target: Path | None) -> str:
    at_work = [job for job in _jobs.values() if job.process.poll() is None]
    if len(at_work) >= MAX_JOBS:
        raise StateError("Other files are being made; wait until one of them is done.")
    job_id = secrets.token_hex(16)
    output = folder / f".tool-{job_id}"
    with open(output, "wb") as lines:
        process = trainer_process.start(
            arguments, folder, stdin=subprocess.DEVNULL, stdout=lines, stderr=lines
        )
    _jobs[job_id] = Job(folder, process, output, target)
    return job_id


def _lines(output: Path) -> list[str]:
    if not output.exists():
        return []
    return output.read_text(encoding="utf-8", errors="replace").splitlines()


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _reason(lines: list[str]) -> str:
    """Returns the last line that is not JSON: the message of a tool that failed."""
    for line in reversed(lines):
        if line.strip() and _parsed(line) is None:
            return line
    return "The tool ended without a message; try it again."


def _unused_file(folder: Path, stem: str) -> Path:
    for number in range(1, MAX_FILES):
        file = folder / f"{stem}{'' if number == 1 else f'-{number}'}.safetensors"
        if not file.exists():
            return file
    raise StateError(f"There are too many files named {stem}; delete some of them.")


def _one_of(options: BrowserData, key: str, choices: tuple[str, ...], label: str) -> str:
    if options.get(key) not in choices:
        raise StateError(f"Choose a {label}: {' or '.join(choices)}.")
    return str(options[key])


def _rank(value: object) -> int:
    """Returns a rank, or 0 to keep the rank."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_RANK:
        raise StateError(f"The rank is a whole number up to {MAX_RANK}.")
    return value


def _strength(value: object) -> str:
    if (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= MAX_STRENGTH
    ):
        return f"{float(value):.4f}"
    raise StateError(f"A strength is a number from -{MAX_STRENGTH} to {MAX_STRENGTH}.")

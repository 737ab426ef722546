"""What the Library does with a finished adapter file: say what is in it, and make another one from it.

The work is `python -m trainer info | convert | resize | compose --json` in a process of its own, since the page imports no torch.
"""

import json
import secrets
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.jobs import runs
from app.views import run_view
from trainer.errors import StateError
from trainer.runs import run_folder

DIALECTS = ("kohya", "diffusers")
PRECISIONS = ("fp16", "bf16", "fp32")
AT_ONCE = 2  # tools at work, of everyone together: each takes the memory of a torch process
LARGEST_RANK = 512


@dataclass(frozen=True)
class Job:
    run: Path
    process: subprocess.Popen
    output: Path
    """The lines the tool prints."""
    made: Path | None
    """The file it makes, if any."""


_jobs: dict[str, Job] = {}


def look(run_id: object) -> str:
    """Starts reading the adapter of a run. Returns the job's id."""
    folder = runs.resolve(run_id)
    return _start(folder, ["info", str(adapter_of(folder)), "--ranks", "--json"], None)


def make(run_id: object, wishes: dict[str, Any]) -> str:
    """Starts making a file: in another format, of another rank, or together with the adapter of another run. Returns the job's id."""
    folder = runs.resolve(run_id)
    source = adapter_of(folder)
    dialect, precision, rank = (
        _one_of(wishes, "dialect", DIALECTS),
        _one_of(wishes, "precision", PRECISIONS),
        _rank(wishes.get("rank")),
    )
    size = ["--rank", str(rank)] if rank else []
    if wishes.get("other"):
        other = adapter_of(runs.resolve(wishes["other"]))
        adapters = [
            f"{source}:{_strength(wishes.get('own_strength'))}",
            f"{other}:{_strength(wishes.get('other_strength'))}",
        ]
        command, name = (
            ["compose", "--adapter", adapters[0], "--adapter", adapters[1], *size],
            f"{source.stem}+{other.stem}",
        )
    elif rank:
        command, name = ["resize", str(source), *size], f"{source.stem}-rank{rank}"
    else:
        command, name = ["convert", str(source)], f"{source.stem}-{dialect}-{precision}"
    target = _free(folder, run_folder.slug(name))
    return _start(
        folder,
        [*command, "--to", dialect, "--precision", precision, "--output", str(target), "--json"],
        target,
    )


def shrink(run_id: object, rank: object) -> str:
    """Starts making a smaller file in the format of the finished one. Returns the job's id."""
    folder = runs.resolve(run_id)
    try:
        facts = json.loads((folder / "learned.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise StateError(
            "It is not known how large this adapter has to be; choose a rank under Tools in the Library."
        ) from None
    return make(
        run_id, {"dialect": facts.get("dialect"), "precision": facts.get("precision"), "rank": rank}
    )


def state(job_id: object) -> dict:
    """How far a job is: {"progress": [done, total]}, its result, or its one sentence of error. Asked for the last time, it is forgotten."""
    job = _jobs.get(str(job_id))
    if job is None:
        raise StateError("That is not known any more; do it again.")
    lines = (
        job.output.read_text(encoding="utf-8", errors="replace").splitlines()
        if job.output.exists()
        else []
    )
    said = [data for line in lines if isinstance(data := _parsed(line), dict)]
    if job.process.poll() is None:
        return {"progress": said[-1].get("progress", [0, 0]) if said else [0, 0]}
    del _jobs[str(job_id)]
    job.output.unlink(missing_ok=True)
    if job.process.returncode or not said:
        reason = next(
            (line for line in reversed(lines) if line.strip() and _parsed(line) is None),
            "it ended without a word",
        )
        raise StateError(reason)
    if job.made is None:
        return {"facts": said[-1]}
    made = {
        "name": job.made.name,
        "href": f"/runfile/{job.run.name}/{job.made.name}",
        "size": run_view.size(job.made.stat().st_size),
    }
    return {
        "file": made,
        "kept": said[-1].get("kept_energy", ""),
        "worst": said[-1].get("worst_module", ""),
    }


def adapter_of(folder: Path) -> Path:
    """Raises StateError where the run has none yet."""
    file = run_view.final_file(folder, runs.status(folder))
    if file is None:
        raise StateError("This run has saved no adapter yet.")
    return folder / file["name"]


def _start(folder: Path, arguments: list[str], made: Path | None) -> str:
    if sum(job.process.poll() is None for job in _jobs.values()) >= AT_ONCE:
        raise StateError("Other files are being made; wait until one of them is done.")
    job_id = secrets.token_hex(16)
    output = folder / f".tool-{job_id}"
    with open(output, "wb") as lines:
        process = runs.trainer_process(
            arguments, folder, stdin=subprocess.DEVNULL, stdout=lines, stderr=lines
        )
    _jobs[job_id] = Job(folder, process, output, made)
    return job_id


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _free(folder: Path, stem: str) -> Path:
    names = (
        f"{stem}{'' if number == 1 else f'-{number}'}.safetensors" for number in range(1, 1000)
    )
    return next(folder / name for name in names if not (folder / name).exists())


def _one_of(wishes: dict[str, Any], name: str, words: tuple[str, ...]) -> str:
    if wishes.get(name) not in words:
        raise StateError(f"Choose a {name}: {' or '.join(words)}.")
    return wishes[name]


def _rank(value: object) -> int:
    """0: as it is."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST_RANK:
        raise StateError(f"The rank is a whole number up to {LARGEST_RANK}.")
    return value


def _strength(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -4 <= value <= 4:
        raise StateError("A strength is a number from -4 to 4.")
    return f"{float(value):.4f}"

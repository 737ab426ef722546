"""Runs whose events a test writes itself, to show the page in any state without training."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageDraw

from trainer import config
from trainer.runs import run_folder, run_lock, run_requests
from trainer.runs.events import (
    AdapterSaved,
    EventLog,
    Failed,
    Finished,
    Launched,
    SampleSaved,
    Started,
    StepDone,
    Validated,
)

PROMPT = "a zorbit on a green background"


made: list[Path] = []
"""The runs that `stage` made since the last test. Tests share a server, so they are deleted."""


def stage(name: str, steps: int, total: int = 100, **changes) -> Path:
    """Makes a run of `total` steps and 5 saves that has reached `steps`, with its files so far."""
    settings = {
        "name": name,
        "dataset.trigger": "zorbit",
        "sampling.prompts": [PROMPT],
        "training.steps": total,
        **changes,
    }
    folder = run_folder.create(config.replace(config.RunConfig(), settings))
    made.append(folder)
    (folder / "samples").mkdir()
    log = EventLog(folder / "events.jsonl")
    log.append(Launched(1, "0"))
    log.append(
        Started(
            0,
            total,
            11,
            1,
            374528,
            "CPU (2 threads)",
            "fp32",
            "torch's attention",
            "sd1",
            saves=5,
            images_per_step=4,
        )
    )
    _station(log, folder, 0, total)
    for step in range(1, steps + 1):
        log.append(
            StepDone(
                step, 0.2 / (1 + step / 30) + 0.02 * (step % 3), 1e-4 * (1 - step / total), 0.25
            )
        )
        if step % (total // 5) == 0:
            _station(log, folder, step, total)
    return folder


def _station(log: EventLog, folder: Path, step: int, total: int) -> None:
    log.append(Validated(step, 0.2 / (1 + step / 40)))
    if step:
        name = f"{run_folder.slug(config.load(folder / 'run.toml').name)}-{step:06d}.safetensors"
        (folder / name).write_bytes(b"x" * 100_000)
        log.append(AdapterSaved(step, name, 0.2 / (1 + step / 40)))
    file = f"samples/{step:06d}-0.png"
    image = Image.new("RGB", (64, 64), (90, 150 - step, 90))
    ImageDraw.Draw(image).ellipse(
        (12, 12, 12 + 40 * max(step, 8) // total, 52), fill=(230, 150, 40)
    )
    image.save(folder / file)
    log.append(SampleSaved(step, PROMPT, 1, file))


def finish(folder: Path, steps: int = 100) -> None:
    file = run_folder.slug(config.load(folder / "run.toml").name) + ".safetensors"
    (folder / file).write_bytes(b"x" * 100_000)
    EventLog(folder / "events.jsonl").append(Finished(steps, file, steps, 31.0))


def fail(folder: Path, message: str) -> None:
    EventLog(folder / "events.jsonl").append(Failed(message))


@contextmanager
def at_work(folder: Path) -> Iterator[EventLog]:
    """The run is alive while this lasts, as far as anybody can see."""
    lock = run_lock.acquire(folder)
    try:
        yield EventLog(folder / "events.jsonl")
    finally:
        lock.release()


def requests(folder: Path) -> set[str]:
    return {
        what
        for what in ("stop", "pause", "save", "sample", "queued")
        if run_requests.requested(folder, what)
    }

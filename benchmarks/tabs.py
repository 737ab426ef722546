"""Measures the cost of 50 open tabs: training speed and memory of the page, with and without them.

    python -m benchmarks.tabs [--tabs 50] [--seconds 300]

Each tab sends its timer event once a second. Phases with and without tabs alternate, so that a
machine that changes its speed is noticed. The tabs run in this process. It uses one core, because
real tabs run on other machines and leave the cores to the training and the page.
"""

import argparse
import asyncio
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}

import httpx

from tests.tiny import make_dataset, save_tiny_base
from trainer import config
from trainer.runs import run_folder, run_lock, run_requests, run_status

PARTS = 3
PORT = 7931
ADDRESS = f"http://127.0.0.1:{PORT}"


async def tab(session: str, tick: int, until: float, answered: list[float]) -> None:
    """Sends the timer event of a browser window once a second."""
    async with httpx.AsyncClient(base_url=ADDRESS, timeout=60) as client:
        while time.monotonic() < until:
            begin = time.monotonic()
            call = {"data": [None], "fn_index": tick, "session_hash": session}
            await client.post("/gradio_api/queue/join", json=call)
            await client.get(f"/gradio_api/queue/data?session_hash={session}")
            answered.append(time.monotonic() - begin)
            await asyncio.sleep(max(0.0, 1 - (time.monotonic() - begin)))


async def open_tabs(sessions: list[str], seconds: float) -> list[float]:
    """Keeps the tabs open for some seconds. Returns the duration of each answer."""
    async with httpx.AsyncClient(base_url=ADDRESS, timeout=60) as client:
        dependencies = (await client.get("/config")).json()["dependencies"]
    tick = next(
        d["id"] for d in dependencies if any(target[1] == "tick" for target in d["targets"])
    )
    answered: list[float] = []
    until = time.monotonic() + seconds
    await asyncio.gather(*(tab(session, tick, until, answered) for session in sessions))
    return answered


def memory(process: subprocess.Popen) -> float:
    """Returns the resident megabytes of a process."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def speed(folder: Path, work: Callable[[], object]) -> float:
    """Returns the steps per second of a run while `work` runs."""
    first, begin = run_status.read_status(folder).step, time.monotonic()
    work()
    return (run_status.read_status(folder).step - first) / (time.monotonic() - begin)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tabs", type=int, default=50)
    parser.add_argument(
        "--seconds",
        type=float,
        default=300,
        help="seconds with tabs, in three parts; half as long without",
    )
    options = parser.parse_args()
    part, sessions = options.seconds / PARTS, [secrets.token_hex(6) for _ in range(options.tabs)]
    with tempfile.TemporaryDirectory(prefix="tabs-") as temporary:
        os.environ["ATELIER_OUTPUTS"] = str(Path(temporary, "outputs"))
        settings = {
            "base.model": str(save_tiny_base(Path(temporary, "base"))),
            "dataset.folder": str(make_dataset(Path(temporary, "dataset"))),
            "dataset.resolution": 64,
            "dataset.bucket_step": 8,
            "dataset.allow_upscale": True,
            "training.batch_size": 8,
            "training.steps": 100_000,
            "saving.saves": 1,
            "saving.state_every": 100_000,
            "sampling.prompts": ["a"],
            "sampling.inference_steps": 1,
        }
        folder = run_folder.create(config.replace(config.RunConfig(), settings))
        page = subprocess.Popen(
            [sys.executable, "-m", "app", "--no-browser", "--port", str(PORT)],
            stdout=subprocess.DEVNULL,
        )
        run_requests.request(folder, "queued")
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        try:
            while run_status.read_status(folder).step < 20:
                time.sleep(0.5)
            alone, beside, waits, held = [], [], [], [memory(page)]
            for _ in range(PARTS):
                alone.append(speed(folder, lambda: time.sleep(part / 2)))
                beside.append(
                    speed(folder, lambda: waits.extend(asyncio.run(open_tabs(sessions, part))))
                )
                held.append(memory(page))
        finally:
            run_requests.request(folder, "stop")
            while run_lock.is_alive(folder):
                time.sleep(0.2)
            page.terminate()
            page.wait()
    print(
        f"steps per second: {alone} without, {beside} with {options.tabs} tabs: "
        f"{sum(beside) / sum(alone):.1%}"
    )
    print(
        f"{len(waits)} answers, median {statistics.median(waits):.2f} s, slowest {max(waits):.2f} s"
    )
    memory_of_page = ", ".join(f"{megabytes:.0f} MB" for megabytes in held)
    print(f"memory of the page: {memory_of_page} (before, after each part)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Measures how much longer the embedded job takes beside programs that keep every core busy.

    python -m benchmarks.busy [--steps 40] [--rounds 2] [--loops N] [--environment NAME=VALUE ...]

Each round trains once alone and once beside as many busy loops as there are cores. `--environment
OMP_NUM_THREADS=2 GOMP_SPINCOUNT=300000` measures two threads that spin while they wait, the default
of GCC's OpenMP. Seconds are wall-clock time. Exits with 1 if the job takes over 2.5 times as long.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.startup import processor_seconds
from trainer.cli.demo_report import EXAMPLE, PRESET
from trainer.models.cpu_threads import available_cores
from trainer.runs import events, run_folder

LIMIT = 2.5
"""Times as long beside the busy loops. An equal share of the cores for everybody gives 1.5."""


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Runs programs that never wait."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def measure(options: argparse.Namespace, loops: int) -> dict[str, float | str]:
    """Runs a job beside so many loops. `others` is the number of cores used by anything else."""
    begin, used, worked = time.monotonic(), all_seconds(), processor_seconds()
    with busy_loops(loops):
        result = train(options.steps, options.environment)
    others = all_seconds() - used - (processor_seconds() - worked)
    return result | {"others": max(0.0, others / (time.monotonic() - begin))}


def all_seconds() -> float:
    """Returns the processor seconds of all programs since the machine started."""
    times = psutil.cpu_times()
    return times.user + times.system + getattr(times, "nice", 0.0)


def train(steps: int, environment: Sequence[str]) -> dict[str, float | str]:
    """Returns the seconds of the whole process, and of its median and worst step."""
    settings = [f"training.steps={steps}", "saving.saves=1"]
    with tempfile.TemporaryDirectory() as outputs:
        command = [sys.executable, "-m", "trainer", "train", PRESET, "--name", "busy"]
        command += ["--dataset", str(EXAMPLE)]
        for setting in settings:
            command += ["--set", setting]
        variables = dict(setting.split("=", 1) for setting in environment)
        begin = time.monotonic()
        subprocess.run(
            command,
            env=os.environ | variables | {"ATELIER_OUTPUTS": outputs},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        whole = time.monotonic() - begin
        folder = run_folder.list_runs(Path(outputs) / "runs")[0]
        found = list(events.read_events(folder / "events.jsonl"))
    steps_taken = [event.seconds for event in found if isinstance(event, events.StepDone)]
    device = next(event.device for event in found if isinstance(event, events.Started))
    return {
        "job": whole,
        "step": statistics.median(steps_taken),
        "worst step": max(steps_taken),
        "device": device,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--loops", type=int, default=available_cores(), help="busy loops (default: one per core)"
    )
    parser.add_argument(
        "--environment",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="variables for the trainer",
    )
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args()
    rounds = []
    for _ in range(options.rounds):
        rounds.append({"alone": measure(options, 0), "beside": measure(options, options.loops)})
    print(f"{rounds[0]['alone']['device']}; {options.steps} steps, {options.loops} busy loops\n")
    print("| seconds, medians | alone | beside busy loops | times as long |\n|---|--:|--:|--:|")
    ratios = {}
    for name in ("job", "step", "worst step"):
        alone, beside = (
            statistics.median(each[where][name] for each in rounds) for where in ("alone", "beside")
        )
        ratios[name] = statistics.median(
            each["beside"][name] / each["alone"][name] for each in rounds
        )
        print(f"| {name} | {alone:.2f} | {beside:.2f} | {ratios[name]:.2f} |")
    others = [max(each[where]["others"] for each in rounds) for where in ("alone", "beside")]
    print(f"| cores used by other programs | {others[0]:.2f} | {others[1]:.2f} | |")
    if options.json:
        document = {
            "steps": options.steps,
            "loops": options.loops,
            "environment": options.environment,
            "rounds": rounds,
            "ratios": ratios,
        }
        options.json.write_text(json.dumps(document, indent=1), encoding="utf-8")
    return int(ratios["job"] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())

"""Measures the start of a trainer up to its first step, and of the page up to its first answer.

    python -m benchmarks.startup [--preset embedded-subject] [--dataset DIR] [--set KEY=VALUE]
        [--json FILE]

The trainer starts twice with the same images. The first start encodes everything; the second finds
everything in the cache. Seconds are wall-clock time, as a person experiences it.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from app.__main__ import listen
from trainer.models.model_files import EMBEDDED_FOLDER
from trainer.runs import events, run_folder

EXAMPLE = EMBEDDED_FOLDER.parent / "examples" / "subject"
FIRST_EVENTS = {
    "run locked": events.Launched,
    "libraries imported": events.Progress,
    "base loaded, dataset cached": events.Started,
    "base measured": events.Validated,
    "base sampled": events.SampleSaved,
    "first step done": events.StepDone,
}


def start_trainer(outputs: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the seconds to the first event of each kind, and the use of the cache."""
    settings = ["training.steps=1", "training.warmup=0.0", "saving.saves=1", *options.settings]
    command = [sys.executable, "-m", "trainer", "train", options.preset]
    command += ["--dataset", str(options.dataset), "--name", "startup"]
    command += [f"--set={setting}" for setting in settings]
    environment = os.environ | {"ATELIER_OUTPUTS": str(outputs)}
    before = entries(outputs)
    begin, monotonic, used = time.time(), time.monotonic(), processor_seconds()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    whole, worked = time.monotonic() - monotonic, processor_seconds() - used
    run = run_folder.list_runs(outputs / "runs")[0]
    logged = list(events.read_events(run / "events.jsonl"))
    seconds = {
        name: next(event.time for event in logged if type(event) is kind) - begin
        for name, kind in FIRST_EVENTS.items()
    }
    after = entries(outputs)
    hits = sum(used > before[name] for name, used in after.items() if name in before)
    return {
        "seconds": seconds | {"process ended": whole},
        "made": len(after.keys() - before.keys()),
        "hits": hits,
        "processor_seconds": worked,
    }


def processor_seconds() -> float:
    """Returns the processor seconds of all ended children. They vary less on a busy machine."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def entries(outputs: Path) -> dict[str, float]:
    """Returns the time of the last use of each cache entry (`cache_limits.touch`)."""
    return {
        path.name: path.stat().st_atime for path in (outputs / "cache").glob("??/*.safetensors")
    }


def start_page(outputs: Path) -> dict[str, float]:
    """Returns the seconds until the page answers, and until the whole page was sent."""
    listening = listen("127.0.0.1", 7940)
    assert listening, "no port is free"
    port = listening.getsockname()[1]
    listening.close()
    begin = time.monotonic()
    command = [sys.executable, "-m", "app", "--no-browser", "--port", str(port)]
    process = subprocess.Popen(
        command, env=os.environ | {"ATELIER_OUTPUTS": str(outputs)}, stdout=subprocess.DEVNULL
    )
    try:
        while process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/config", timeout=60).read()
                break
            except urllib.error.URLError:
                time.sleep(0.05)
        first = time.monotonic() - begin
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60).read()
        return {"first answer": first, "page sent": time.monotonic() - begin}
    finally:
        process.terminate()
        process.wait()


def print_table(trainer: Sequence[Mapping[str, Any]], page: Sequence[Mapping[str, float]]) -> None:
    print("| from the start of the process, seconds | first start | second start |\n|---|--:|--:|")
    for name in trainer[0]["seconds"]:
        seconds = " | ".join(f"{each['seconds'][name]:.1f}" for each in trainer)
        print(f"| trainer: {name} | {seconds} |")
    print(
        "| processor seconds of the trainer | "
        + " | ".join(f"{each['processor_seconds']:.1f}" for each in trainer)
        + " |"
    )
    print(
        "| cache entries made, found | "
        + " | ".join(f"{each['made']}, {each['hits']}" for each in trainer)
        + " |"
    )
    for name in page[0]:
        seconds = " | ".join(f"{each[name]:.1f}" for each in page)
        print(f"| page: {name} | {seconds} |")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="embedded-subject")
    parser.add_argument("--dataset", type=Path, default=EXAMPLE)
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as outputs:
        trainer = [start_trainer(Path(outputs), options) for _ in range(2)]
        page = [start_page(Path(outputs)) for _ in range(2)]
    print_table(trainer, page)
    if options.json:
        options.json.write_text(
            json.dumps({"preset": options.preset, "trainer": trainer, "page": page}, indent=1),
            encoding="utf-8",
        )
    # The second start must find everything in the cache.
    return int(trainer[1]["made"] > 0)


if __name__ == "__main__":
    sys.exit(main())

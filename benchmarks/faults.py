"""Injects faults into real trainings and a real page, and checks that nothing is lost.

    python -m benchmarks.faults               about five minutes on two idle cores
    python -m benchmarks.faults --soak 120    repeats for 120 minutes

`--write` puts the table into docs/reliability.md. A fault is survived if every file under its final
name is complete, a valid checkpoint exists, and the resumed run ends with exactly the adapter of
the undisturbed run. Each trainer and each page is a fork of this process, so that libraries are
imported only once.
"""

import argparse
import base64
import json
import os
import random
import resource
import signal
import socket
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}

import torch
from safetensors.torch import load_file

from tests.killer import arm, live
from tests.tiny import make_dataset, save_tiny_base
from trainer import config
from trainer.runs import events, run_folder, run_lock, run_requests, run_status
from trainer.training import trainer_state
from trainer.training.runner import STOPPED, run_in

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"
STEPS = 12
SETTINGS = {
    "dataset.resolution": 32,
    "dataset.bucket_step": 8,
    "dataset.caption_dropout": 0.3,
    "training.steps": STEPS,
    "training.batch_size": 2,
    "training.learning_rate": 1e-2,
    "training.text_encoder_learning_rate": 1e-3,
    "adapter.rank": 2,
    "adapter.dropout": 0.2,
    "saving.saves": 2,
    "saving.state_every": 3,
    "saving.precision": "fp32",
    "sampling.inference_steps": 1,
    "sampling.prompts": ["a"],
}


@dataclass
class Tally:
    fault: str
    injected: int = 0
    survived: int = 0
    lost: list[str] = field(default_factory=list)

    def count(self, problem: str) -> None:
        self.injected += 1
        self.survived += not problem
        if problem:
            self.lost.append(problem)

    def add(self, other: "Tally") -> None:
        self.injected += other.injected
        self.survived += other.survived
        self.lost += other.lost


class Lab:
    """A temporary folder with a tiny base, a dataset and an undisturbed reference run."""

    def __init__(self, folder: Path, seed: int = 0):
        os.environ["ATELIER_OUTPUTS"] = str(folder / "outputs")
        self.random = random.Random(seed)
        self.base = save_tiny_base(folder / "base")
        self.dataset = make_dataset(folder / "dataset", sizes=((16, 16), (24, 16)))
        self.reference = self.new_run()
        begin = time.monotonic()
        assert os.waitstatus_to_exitcode(live(self.reference, None)) == 0
        self.seconds = time.monotonic() - begin
        self.adapter = load_file(self.reference / "tiny.safetensors")

    def new_run(self, **changes: object) -> Path:
        settings = (
            {"name": "tiny", "base.model": str(self.base), "dataset.folder": str(self.dataset)}
            | SETTINGS
            | changes
        )
        return run_folder.create(config.replace(config.RunConfig(), settings))

    def finish(self, folder: Path) -> str:
        """Resumes a run to its end. Returns the problem with its adapter, or ""."""
        code = os.waitstatus_to_exitcode(live(folder, None))
        if code != 0:
            return f"{folder.name} could not be finished: {run_status.read_status(folder).message}"
        adapter = load_file(folder / "tiny.safetensors")
        same = adapter.keys() == self.adapter.keys() and all(
            torch.equal(adapter[name], self.adapter[name]) for name in adapter
        )
        return "" if same else f"{folder.name} ended with another adapter"


def broken_file(folder: Path) -> str:
    """Returns the first file under its final name that is incomplete, or ""."""
    for path in [*folder.glob("*.safetensors"), *folder.glob("state/[0-9]*/*.safetensors")]:
        try:
            load_file(path)
        except Exception as error:  # whatever the type, the file cannot be read
            return f"{path}: {error}"
    folders = list((folder / "state").glob("[0-9]*"))
    if folders:
        checkpoint, problem = trainer_state.load_checkpoint(folder)
        if checkpoint is None or problem:
            return f"{folder}/state: {problem}"
    config.load(folder / "run.toml")
    return ""


def fork(work: Callable[[], int]) -> int:
    """Runs something in a fork, quietly; its process id."""
    child = os.fork()
    if child == 0:
        sys.stdout.flush()
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        code = 1
        with suppress(BaseException):
            code = work()
        os._exit(code)
    return child


def kill_trainer(lab: Lab, times: int) -> Tally:
    tally = Tally("kill -9 of the trainer at a random moment")
    while tally.injected < times:
        folder, problems = lab.new_run(), []
        for _ in range(min(5, times - tally.injected)):
            child = fork(lambda folder=folder: run_in(folder))
            time.sleep(lab.random.uniform(0.02, 0.9) * lab.seconds)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            problems.append(broken_file(folder))
        end = lab.finish(folder)
        for problem in problems:
            tally.count(problem or end)
    return tally


def kill_in_save(lab: Lab, times: int) -> Tally:
    tally = Tally("kill -9 during a save, at each fsync and rename")
    for number in range(1, times + 1):
        folder = lab.new_run()
        child = fork(lambda folder=folder, number=number: arm("save", number) or run_in(folder))
        os.waitpid(child, 0)
        tally.count(broken_file(folder) or lab.finish(folder))
    return tally


def terminate(lab: Lab, times: int) -> Tally:
    tally = Tally("SIGTERM at a random moment")
    for _ in range(times):
        folder = lab.new_run()
        child = fork(lambda folder=folder: run_in(folder))
        while not any(
            isinstance(e, events.Launched) for e in events.read_events(folder / "events.jsonl")
        ):
            time.sleep(0.02)
        time.sleep(0.1 + lab.random.uniform(0, 0.7) * lab.seconds)
        os.kill(child, signal.SIGTERM)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        status = run_status.read_status(folder)
        checkpoint = trainer_state.load_checkpoint(folder)[0]
        is_saved = checkpoint is not None and checkpoint.step == status.step
        is_right = code in (0, STOPPED) and is_saved
        tally.count(
            broken_file(folder)
            or ("" if is_right else f"ended with {code} at {status.step}")
            or lab.finish(folder)
        )
    return tally


def fill_disk(lab: Lab, times: int) -> Tally:
    tally = Tally("disk full while a file is written")

    def limited(folder: Path, limit: int) -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return run_in(folder)

    for number in range(times):
        folder = lab.new_run()
        child = fork(lambda folder=folder, number=number: limited(folder, 4000 + 5000 * number))
        os.waitpid(child, 0)
        tally.count(broken_file(folder) or lab.finish(folder))
    return tally


def damage_states(lab: Lab, times: int) -> Tally:
    tally = Tally("newest checkpoint damaged: a file missing, empty, cut in half, one byte flipped")
    cases = list(
        product(
            ("adapter.safetensors", "optimizer.safetensors", "state.json"),
            ("missing", "empty", "half", "flipped"),
        )
    )
    for name, how in lab.random.sample(cases, min(times, len(cases))):
        folder = lab.new_run()
        assert live(folder, ["StateSaved", 6]) == signal.SIGKILL
        path = folder / "state" / "000006" / name
        content = path.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
        path.unlink()
        if how != "missing":
            damaged = {"empty": b"", "half": content[:middle], "flipped": flipped}
            path.write_bytes(damaged[how])
        tally.count(lab.finish(folder))
    return tally


def kill_page(lab: Lab, times: int) -> Tally:
    """Kills the page again and again while captions are written through it and a run trains."""
    import app.__main__
    import app.server

    tally = Tally("kill -9 of the page, while a run goes on and captions are written")
    outputs = run_folder.outputs_folder()
    make_dataset(outputs / "datasets" / "cats")
    caption = outputs / "datasets" / "cats" / "00.txt"
    texts = [letter * 5000 for letter in "abcdefgh"]
    caption.write_text(texts[0])
    folder = lab.new_run()
    run_requests.request(folder, "queued")
    written = 0
    for _ in range(times):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        child = fork(lambda port=port: app.__main__.main(["--no-browser", "--port", str(port)]))
        end = time.monotonic() + lab.random.uniform(0, 8)
        while time.monotonic() < end:
            written += write_caption(port, lab.random.choice(texts))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        tally.count("" if caption.read_text() in texts else "a caption is a mixture of two")
    print(f"{written} captions were written through {times} starts of the page")
    wait = time.monotonic() + 120
    while run_lock.is_alive(folder) and time.monotonic() < wait:
        time.sleep(0.2)
    run_requests.withdraw(folder, "queued")
    launches = sum(
        isinstance(event, events.Launched) for event in events.read_events(folder / "events.jsonl")
    )
    problem = (
        broken_file(folder)
        or lab.finish(folder)
        or ("" if launches <= 1 else f"{launches} trainers for one run")
    )
    if problem:
        tally.lost.append(problem)
    return tally


def write_caption(port: int, text: str) -> bool:
    """Writes a caption through the page as a browser does. Returns False if the page is down."""
    address = f"http://127.0.0.1:{port}"
    try:
        configuration = json.load(urllib.request.urlopen(f"{address}/config", timeout=5))
        grid = next(
            c["id"]
            for c in configuration["components"]
            if c["props"].get("elem_id") == "dataset-view"
        )
        call = {"component_id": grid, "session_hash": "x", "fn_name": "save_caption"}
        call["data"] = {"dataset": "cats", "file": "00.png", "caption": text}
        headers = {
            "content-type": "application/json",
            "x-nonce": base64.b64encode(os.urandom(6)).decode(),
        }
        request = urllib.request.Request(
            f"{address}/gradio_api/component_server", json.dumps(call).encode(), headers
        )
        return json.load(urllib.request.urlopen(request, timeout=5)).get("caption") == text
    except OSError:
        time.sleep(0.05)
        return False


def all_faults(lab: Lab, share: float = 1.0) -> list[Tally]:
    def times(count: int) -> int:
        return max(1, round(count * share))

    return [
        kill_trainer(lab, times(60)),
        kill_in_save(lab, times(20)),
        kill_page(lab, times(20)),
        terminate(lab, times(8)),
        fill_disk(lab, times(6)),
        damage_states(lab, times(12)),
    ]


def table(tallies: list[Tally]) -> str:
    lines = ["| fault | times injected | survived | lost |", "|---|---|---|---|"]
    return "\n".join(
        [*lines, *(f"| {t.fault} | {t.injected} | {t.survived} | {len(t.lost)} |" for t in tallies)]
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--soak", type=float, default=0, metavar="MINUTES", help="repeat for this long"
    )
    parser.add_argument(
        "--share", type=float, default=1.0, help="fraction of the usual number of faults"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--write", action="store_true", help="put the table into docs/reliability.md"
    )
    options = parser.parse_args()
    os.nice(5)
    total: dict[str, Tally] = {}
    end, seed = time.monotonic() + 60 * options.soak, options.seed
    while not total or time.monotonic() < end:
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            for tally in all_faults(Lab(Path(folder), seed), options.share):
                total.setdefault(tally.fault, Tally(tally.fault)).add(tally)
        seed += 1
        print(table(list(total.values())), flush=True)
    for problem in (problem for tally in total.values() for problem in tally.lost):
        print(problem)
    if options.write:
        before, begin, rest = PAGE.read_text(encoding="utf-8").partition("<!-- faults -->\n")
        _, end_marker, after = rest.partition("<!-- end -->")
        page = f"{before}{begin}{table(list(total.values()))}\n{end_marker}{after}"
        PAGE.write_text(page, encoding="utf-8")
    return int(any(tally.lost for tally in total.values()))


if __name__ == "__main__":
    sys.exit(main())

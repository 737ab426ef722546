"""Trains runs with several processes each, on CPUs with gloo, as torchrun would start them; some are killed.

`python tests/ranks.py JOB.json`: [{"folder": ..., "processes": 2, "kill": [rank, event, step] or null}, ...]. Each process is a fork of
this one, so that the libraries are read once. Prints the exit codes of each run's processes as a JSON line.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path

import trainer.training.loop  # noqa: F401  (before the forks)
from trainer.runs import events
from trainer.training import loop
from trainer.training.runner import run_in


def arm(place: str, step: int) -> None:
    """Dies at a step: "event" right after its StepDone was told, "gradients" when its own share of them is there."""
    if place == "gradients":
        forward_backward = loop.forward_backward

        def dying(session, now, scaler):
            loss = forward_backward(session, now, scaler)
            if now == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return loss

        loop.forward_backward = dying
        return
    for kind in (events.EventLog, events.SilentLog):
        append = kind.append

        def told(self, event, append=append):
            append(self, event)
            if isinstance(event, events.StepDone) and event.step == step:
                os.kill(os.getpid(), signal.SIGKILL)

        kind.append = told


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def process(rank: int, run: dict, port: int) -> int:
    child = os.fork()
    if child == 0:
        if run["processes"] > 1:
            told = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": run["processes"],
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            os.environ |= {name: str(value) for name, value in told.items()}
        if run["kill"] and run["kill"][0] == rank:
            arm(*run["kill"][1:])
        os._exit(run_in(Path(run["folder"])))
    return child


def main(job: Path) -> None:
    for run in json.loads(job.read_text()):
        port = free_port()
        children = [process(rank, run, port) for rank in range(run["processes"])]
        print(
            json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]),
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

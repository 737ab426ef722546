"""Trains runs with several processes each, on CPUs with gloo, as torchrun would start them.

    python tests/ranks.py JOB.json

The job is [{"folder": ..., "processes": 2, "kill": [rank, event, step] or null}, ...]. Each process
is a fork of this one, so that the libraries are imported once. Prints the exit codes of each run's
processes as a line of JSON.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path

from trainer.runs import events
from trainer.training import loop  # imported before the forks
from trainer.training.runner import run_in


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str, step: int) -> None:
    """Makes this process kill itself at a step.

    With "event" it dies right after it has reported the step, with "gradients" after its own
    backward pass, before the sum.
    """
    if moment == "gradients":
        forward_backward = loop.forward_backward

        def forward_backward_and_die(session, now, scaler):
            loss = forward_backward(session, now, scaler)
            if now == step:
                die()
            return loss

        loop.forward_backward = forward_backward_and_die
        return
    for log in (events.EventLog, events.SilentLog):
        append = log.append

        def append_and_die(self, event, append=append):
            append(self, event)
            if isinstance(event, events.StepDone) and event.step == step:
                die()

        log.append = append_and_die


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_process(rank: int, run: dict, port: int) -> int:
    """Forks one rank of a run. Returns its process id."""
    child = os.fork()
    if child != 0:
        return child
    if run["processes"] > 1:
        os.environ["RANK"] = str(rank)
        os.environ["LOCAL_RANK"] = str(rank)
        os.environ["WORLD_SIZE"] = str(run["processes"])
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.environ["MASTER_PORT"] = str(port)
    if run["kill"] and run["kill"][0] == rank:
        arm(*run["kill"][1:])
    os._exit(run_in(Path(run["folder"])))


def main(job: Path) -> None:
    for run in json.loads(job.read_text()):
        port = free_port()
        children = [start_process(rank, run, port) for rank in range(run["processes"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Runs as jobs of a Ray cluster, through the REST API of its dashboard (docs.ray.io, "Ray Jobs REST API"): the page needs no Ray itself.

The cluster's machines see the outputs folder, the bases and this program under the same paths as the page, on a shared drive; so events,
log and adapters are where the page looks for them. A job waits in the cluster until a machine has as many GPUs free as its run asks for.
"""

import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from app.jobs import runs
from trainer.errors import TrainerError
from trainer.runs import run_folder

ASKED_EVERY = 2.0  # seconds
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class ClusterError(TrainerError):
    """The cluster cannot be reached, or refuses a job."""


class RayJobs:
    """An executor. What was submitted is known by the cluster, so a page that starts later finds it again."""

    def __init__(self, address: str):
        self.client = httpx.Client(base_url=address, timeout=20)
        self.given: dict[str, Path] = {}
        """Run folders by the name of their job."""
        self._jobs: dict[str, dict[str, Any]] = {}
        self._asked_at = 0.0

    def has_room(self) -> bool:
        return True

    def start(self, folder: Path) -> None:
        """Submits a run, unless it is there already: submitted by a page that was restarted since. Raises ClusterError."""
        name = job_name(folder)
        self._look(fresh=True)
        if name not in self._jobs:
            self._ask("POST", "/api/jobs/", job(folder, name))
            self._jobs[name] = {"status": "PENDING"}
        self.given[name] = folder

    def poll(self) -> list[tuple[Path, int]]:
        if not self.given:
            return []
        self._look()
        jobs = {
            name: self._jobs.get(name, {"status": "FAILED"}) for name in self.given
        }  # a cluster that was started anew knows none
        return [
            (self.given.pop(name), exit_code(job))
            for name, job in jobs.items()
            if job["status"] in ENDED
        ]

    def stop(self, folder: Path) -> None:
        for name in [name for name, given in self.given.items() if given == folder]:
            self._ask("POST", f"/api/jobs/{name}/stop")
            del self.given[name]

    def _look(self, fresh: bool = False) -> None:
        if fresh or time.monotonic() - self._asked_at > ASKED_EVERY:
            self._jobs = {
                each["submission_id"]: each
                for each in self._ask("GET", "/api/jobs/")
                if each.get("submission_id")
            }
            self._asked_at = time.monotonic()

    def _ask(self, method: str, path: str, content: dict[str, Any] | None = None) -> Any:
        try:
            reply = self.client.request(method, path, json=content)
            reply.raise_for_status()
            return reply.json()
        except (httpx.HTTPError, ValueError) as error:
            raise ClusterError(
                f"The Ray cluster at {self.client.base_url} does not answer ({str(error)[:200]})."
            ) from error


def job_name(folder: Path) -> str:
    """One for each time that a run is put into the queue, in ASCII."""
    plain = folder.name.encode("ascii", "ignore").decode()
    return f"{run_folder.slug(plain)}-{(folder / 'queued').read_text(encoding='utf-8').strip()}"


def job(folder: Path, name: str) -> dict[str, Any]:
    """What is submitted. The command goes through a shell on the cluster; every part of it is quoted."""
    root = str(Path(__file__).resolve().parents[2])
    command = shlex.join([sys.executable, "-P", "-m", runs.TRAINER, "resume", str(folder)])
    variables = {
        "PYTHONUTF8": "1",
        "ATELIER_OUTPUTS": str(folder.parents[1]),
        "ATELIER_SLOT": name,  # Ray gives the GPUs out
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    return {
        "submission_id": name,
        "entrypoint": f"{command} >> {shlex.quote(str(folder / 'log.txt'))} 2>&1",
        "entrypoint_num_gpus": runs.settings(folder).training.devices,
        "runtime_env": {"env_vars": variables},
        "metadata": {"run": folder.name},
    }


def exit_code(ended: dict[str, Any]) -> int:
    code = ended.get("driver_exit_code")
    return code if isinstance(code, int) else 0 if ended["status"] == "SUCCEEDED" else 1

"""Trains the queue on a Ray cluster, through the REST API of the cluster's dashboard.

API: docs.ray.io, "Ray Jobs REST API". The page itself does not need Ray.

The machines of the cluster need the outputs folder, the base models and this program under the
same paths as the page, on a shared drive. The page then finds events, log and adapters in the run
folder.
A job waits in the cluster until a machine has as many free GPUs as its run requires.
"""

import shlex
import sys
from pathlib import Path
from typing import Any

import httpx

from app.jobs import runs, trainer_process
from app.jobs.ttl_cache import TtlCache
from trainer.errors import TrainerError
from trainer.runs import run_folder

POLL_EVERY = 2.0  # seconds
TIMEOUT = 20  # seconds
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")

Job = dict[str, Any]
"""A job in the form of the REST API."""


class ClusterError(TrainerError):
    """The cluster cannot be reached, or refuses a job."""


class RayJobs:
    """An executor that submits each run as a job.

    The cluster keeps the list of jobs. A page that starts later finds its jobs there.
    """

    def __init__(self, address: str):
        self.client = httpx.Client(base_url=address, timeout=TIMEOUT)
        self.submitted: dict[str, Path] = {}
        """Run folders by the name of their job."""
        self.jobs = TtlCache(self._list_jobs, POLL_EVERY, key=lambda: None)

    def has_room(self) -> bool:
        return True

    def start(self, folder: Path) -> None:
        """Submits a run, unless the cluster has its job already. Raises ClusterError.

        The job exists already if the page was restarted after the run had been submitted.
        """
        name = job_name(folder)
        self.jobs.forget()
        if name not in self.jobs():
            self._send("POST", "/api/jobs/", job_request(folder, name))
            self.jobs()[name] = {"status": "PENDING"}
        self.submitted[name] = folder

    def poll(self) -> list[tuple[Path, int]]:
        if not self.submitted:
            return []
        jobs = self.jobs()
        ended = []
        for name in list(self.submitted):
            # A cluster that was restarted has lost its jobs.
            job = jobs.get(name, {"status": "FAILED"})
            if job["status"] in ENDED:
                ended.append((self.submitted.pop(name), exit_code(job)))
        return ended

    def stop(self, folder: Path) -> None:
        for name in [name for name, run in self.submitted.items() if run == folder]:
            self._send("POST", f"/api/jobs/{name}/stop")
            del self.submitted[name]

    def _list_jobs(self) -> dict[str, Job]:
        jobs = self._send("GET", "/api/jobs/")
        return {job["submission_id"]: job for job in jobs if job.get("submission_id")}

    def _send(self, method: str, path: str, content: Job | None = None) -> Any:
        try:
            reply = self.client.request(method, path, json=content)
            reply.raise_for_status()
            return reply.json()
        except (httpx.HTTPError, ValueError) as error:
            raise ClusterError(
                f"The Ray cluster at {self.client.base_url} does not answer ({str(error)[:200]})."
            ) from error


def job_name(folder: Path) -> str:
    """Returns the name of a run's job in ASCII, a different one for each time it is queued."""
    ascii_name = folder.name.encode("ascii", "ignore").decode()
    queued_at = (folder / "queued").read_text(encoding="utf-8").strip()
    return f"{run_folder.slug(ascii_name)}-{queued_at}"


def job_request(folder: Path, name: str) -> Job:
    """Returns the request for a job that trains a run."""
    # A shell on the cluster runs the command, so each part is quoted.
    trainer = [sys.executable, "-P", "-m", trainer_process.TRAINER, "resume", str(folder)]
    log = shlex.quote(str(folder / "log.txt"))
    environment = trainer_process.environment_for(outputs=folder.parents[1])
    environment["ATELIER_SLOT"] = name  # Ray assigns the GPUs, so runs do not wait for each other
    return {
        "submission_id": name,
        "entrypoint": f"{shlex.join(trainer)} >> {log} 2>&1",
        "entrypoint_num_gpus": runs.settings(folder).training.devices,
        "runtime_env": {"env_vars": environment},
        "metadata": {"run": folder.name},
    }


def exit_code(ended: Job) -> int:
    """Returns the exit code of a job that ended. Without one: 0 if it succeeded, else 1."""
    code = ended.get("driver_exit_code")
    if isinstance(code, int):
        return code
    return 0 if ended["status"] == "SUCCEEDED" else 1

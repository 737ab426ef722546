"""The queue on a Ray cluster: what is asked of it, and runs that two nodes on this machine really train."""

import json
import time
from importlib.util import find_spec
from urllib.parse import unquote

import httpx
import pytest

from app.jobs import runs
from app.jobs.ray_jobs import ClusterError, RayJobs, job_name
from trainer import config
from trainer.runs import events, run_folder, run_requests, run_status


class FakeCluster:
    """Answers as the dashboard does, and trains nothing."""

    def __init__(self):
        self.jobs, self.stopped, self.is_there = {}, [], True

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if not self.is_there:
            raise httpx.ConnectError("refused")
        path = unquote(request.url.path)
        if request.method == "GET":
            return httpx.Response(
                200, json=[{"type": "SUBMISSION", **each} for each in self.jobs.values()]
            )
        if path.endswith("/stop"):
            self.stopped.append(path.split("/")[-2])
            return httpx.Response(200, json={"stopped": True})
        wanted = json.loads(request.content)
        if wanted["submission_id"] in self.jobs:
            return httpx.Response(500, text="already exists")
        self.jobs[wanted["submission_id"]] = wanted | {
            "status": "PENDING",
            "driver_exit_code": None,
        }
        return httpx.Response(200, json={"submission_id": wanted["submission_id"]})


@pytest.fixture
def cluster():
    return FakeCluster()


def connected(cluster):
    jobs = RayJobs("http://head:8265")
    jobs.client = httpx.Client(base_url="http://head:8265", transport=httpx.MockTransport(cluster))
    return jobs


def queued(name, changes=None):
    return run_folder.runs_folder() / runs.start(
        config.replace(config.RunConfig(), {"name": name} | (changes or {}))
    )


def given(cluster, name):
    """A run that a launcher has just given to the cluster: its folder, the launcher, the name of its job."""
    folder, launcher = queued(name), runs.Launcher(connected(cluster))
    launcher.look()
    return folder, launcher, job_name(folder)


def test_a_run_becomes_a_job_with_as_many_gpus_as_it_asks_for(outputs, cluster):
    folder = queued("it's; $(touch x) żółć", {"training.devices": 2, "training.batch_size": 2})
    launcher = runs.Launcher(connected(cluster))
    launcher.look()
    launcher.look()
    ((name, job),) = cluster.jobs.items()
    assert (
        job["entrypoint_num_gpus"] == 2 and name.isascii() and job["metadata"]["run"] == folder.name
    )
    assert f"resume {folder}" in job["entrypoint"] or f"resume '{folder}'" in job["entrypoint"]
    assert (
        job["runtime_env"]["env_vars"]["ATELIER_OUTPUTS"] == str(outputs)
        and job["runtime_env"]["env_vars"]["ATELIER_SLOT"] == name
    )


def test_all_that_wait_are_given_to_the_cluster_and_a_restarted_page_gives_none_twice(
    outputs, cluster
):
    folders = [queued(f"number {i}") for i in range(3)]
    launcher = runs.Launcher(connected(cluster))
    for _ in range(4):
        launcher.look()
    assert [job["metadata"]["run"] for job in cluster.jobs.values()] == [
        folder.name for folder in folders
    ]
    after = runs.Launcher(connected(cluster))
    for _ in range(4):
        after.look()
    assert len(cluster.jobs) == 3 and set(after.given) == set(folders)


def test_what_is_taken_out_of_the_queue_is_stopped_before_it_begins(outputs, cluster):
    folder, launcher, name = given(cluster, "changed my mind")
    run_requests.withdraw(folder, "queued")
    launcher.look()
    assert cluster.stopped == [name] and not launcher.given
    run_requests.request(folder, "queued")
    launcher.look()
    assert len(cluster.jobs) == 2  # asked for again


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_job_that_fails_before_it_begins_is_said_with_its_last_line(outputs, cluster, forgotten):
    folder, launcher, name = given(cluster, "short life")
    (folder / "log.txt").write_text("sh: python: not found\n")
    cluster.jobs[name] |= {"status": "FAILED", "driver_exit_code": 127}
    if forgotten:
        del cluster.jobs[name]
    launcher.executor._asked_at = float("-inf")
    launcher.look()
    status = run_status.read_status(folder)
    assert status.state == "failed" and "python: not found" in status.message and not launcher.given


def test_a_run_that_is_resumed_before_its_end_was_noticed_stays_in_the_queue(outputs, cluster):
    folder, launcher, name = given(cluster, "back again")
    run_requests.withdraw(folder, "queued")
    log = events.EventLog(folder / "events.jsonl")
    log.append(events.Launched(1, "0"))
    log.append(events.Stopped(0, ""))
    cluster.jobs[name] |= {"status": "SUCCEEDED", "driver_exit_code": 0}
    run_requests.request(folder, "queued")
    launcher.executor._asked_at = float("-inf")
    launcher.look()
    assert (
        run_requests.requested(folder, "queued")
        and len(cluster.jobs) == 2
        and runs.status(folder).state == "queued"
    )


def test_a_cluster_that_does_not_answer_is_a_sentence_and_nothing_is_lost(outputs, cluster):
    folder = queued("patient")
    launcher = runs.Launcher(connected(cluster))
    cluster.is_there = False
    with pytest.raises(ClusterError, match="http://head:8265"):
        launcher.look()
    assert run_requests.requested(folder, "queued")
    cluster.is_there = True
    launcher.look()
    assert len(cluster.jobs) == 1


def test_a_local_run_that_is_taken_out_of_the_queue_at_the_last_moment_does_not_begin(outputs):
    folder = queued("second thoughts")
    launcher = runs.Launcher()
    launcher.look()
    process = launcher.executor.process
    run_requests.withdraw(folder, "queued")
    launcher.look()
    assert process.wait(60) != 0
    run_requests.request(folder, "queued")  # third thoughts, before the end was noticed
    launcher._launch = launcher.given.setdefault  # given, and no process
    launcher.look()
    assert run_status.read_status(folder).state == "queued" and launcher.executor.process is None
    run_requests.withdraw(folder, "queued")
    assert run_status.read_status(folder).state == "new"


@pytest.mark.skipif(
    find_spec("ray") is None,
    reason="the extra `ray` (240 MB) is not installed: pip install -c constraints.txt -e .[ray]",
)
def test_two_nodes_train_the_queue(tiny_run, outputs):
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "num_gpus": 1,
            "include_dashboard": True,
            "dashboard_port": 8299,
        },
    )
    try:
        cluster.add_node(num_cpus=1, num_gpus=1)
        folders = [
            run_folder.runs_folder() / runs.start(tiny_run({"name": f"on ray {i}"}))
            for i in range(4)
        ]
        launcher = runs.Launcher(RayJobs(f"http://{cluster.head_node.webui_url}"))
        launcher.look()
        run_requests.withdraw(folders[3], "queued")  # the fourth changes its mind
        until = time.monotonic() + 300
        while (
            any(run_status.read_status(folder).state != "finished" for folder in folders[:3])
            and time.monotonic() < until
        ):
            launcher.look()
            time.sleep(0.5)
        jobs = launcher.executor._ask("GET", "/api/jobs/")
        assert len({job["driver_node_id"] for job in jobs if job["driver_node_id"]}) == 2
        for folder in folders[:3]:
            status = run_status.read_status(folder)
            assert status.state == "finished", (folder / "log.txt").read_text()
            assert (
                (folder / status.finished.file).is_file()
                and (folder / "log.txt").read_text()
                and len(status.losses) == 6
            )
        assert run_status.read_status(folders[3]).state == "new"
        while launcher.given and time.monotonic() < until:
            launcher.look()
            time.sleep(0.5)
        assert not launcher.given
    finally:
        cluster.shutdown()

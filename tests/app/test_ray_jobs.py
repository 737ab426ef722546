"""The queue on a Ray cluster: the requests to a stand-in for its dashboard, and a real cluster."""

import json
from importlib.util import find_spec
from urllib.parse import unquote

import httpx
import pytest

from app.jobs import queue, run_actions, runs
from app.jobs.ray_jobs import ClusterError, RayJobs, job_name
from tests.browser.conftest import wait_for
from trainer import config
from trainer.runs import events, run_folder, run_requests, run_status


class FakeCluster:
    """Answers as the dashboard of a cluster does, and trains nothing."""

    def __init__(self):
        self.jobs = {}
        self.stopped = []
        self.is_reachable = True

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if not self.is_reachable:
            raise httpx.ConnectError("refused")
        path = unquote(request.url.path)
        if request.method == "GET":
            jobs = [{"type": "SUBMISSION", **job} for job in self.jobs.values()]
            return httpx.Response(200, json=jobs)
        if path.endswith("/stop"):
            self.stopped.append(path.split("/")[-2])
            return httpx.Response(200, json={"stopped": True})
        job = json.loads(request.content)
        name = job["submission_id"]
        if name in self.jobs:
            return httpx.Response(500, text="already exists")
        self.jobs[name] = job | {"status": "PENDING", "driver_exit_code": None}
        return httpx.Response(200, json={"submission_id": name})


@pytest.fixture
def cluster():
    return FakeCluster()


def connect(cluster):
    jobs = RayJobs("http://head:8265")
    jobs.client = httpx.Client(base_url="http://head:8265", transport=httpx.MockTransport(cluster))
    return jobs


def add_to_queue(name, changes=None):
    run = config.replace(config.RunConfig(), {"name": name} | (changes or {}))
    return run_folder.runs_folder() / run_actions.start(run)


def submit(cluster, name):
    """Returns folder, launcher and job name of a run that was just submitted."""
    folder, launcher = add_to_queue(name), queue.Launcher(connect(cluster))
    launcher.check()
    return folder, launcher, job_name(folder)


def test_a_job_requests_the_gpus_of_its_run_and_quotes_its_command(outputs, cluster):
    changes = {"training.devices": 2, "training.batch_size": 2}
    folder = add_to_queue("it's; $(touch x) żółć", changes)
    launcher = queue.Launcher(connect(cluster))
    launcher.check()
    launcher.check()
    ((name, job),) = cluster.jobs.items()
    assert job["entrypoint_num_gpus"] == 2
    assert name.isascii()
    assert job["metadata"]["run"] == folder.name
    assert f"resume {folder}" in job["entrypoint"] or f"resume '{folder}'" in job["entrypoint"]
    environment = job["runtime_env"]["env_vars"]
    assert environment["ATELIER_OUTPUTS"] == str(outputs)
    assert environment["ATELIER_SLOT"] == name


def test_each_queued_run_is_submitted_once_across_page_restarts(outputs, cluster):
    folders = [add_to_queue(f"number {i}") for i in range(3)]
    launcher = queue.Launcher(connect(cluster))
    for _ in range(4):
        launcher.check()
    submitted = [job["metadata"]["run"] for job in cluster.jobs.values()]
    assert submitted == [folder.name for folder in folders]
    launcher_after_restart = queue.Launcher(connect(cluster))
    for _ in range(4):
        launcher_after_restart.check()
    assert len(cluster.jobs) == 3
    assert set(launcher_after_restart.started) == set(folders)


def test_a_run_that_is_withdrawn_before_it_begins_is_stopped(outputs, cluster):
    folder, launcher, name = submit(cluster, "changed my mind")
    run_requests.withdraw(folder, "queued")
    launcher.check()
    assert cluster.stopped == [name]
    assert not launcher.started
    run_requests.request(folder, "queued")
    launcher.check()
    assert len(cluster.jobs) == 2, "a run that is queued again is a new job"


@pytest.mark.parametrize("is_forgotten", [False, True])
def test_a_job_that_fails_before_training_reports_its_last_line(outputs, cluster, is_forgotten):
    folder, launcher, name = submit(cluster, "short life")
    (folder / "log.txt").write_text("sh: python: not found\n")
    cluster.jobs[name] |= {"status": "FAILED", "driver_exit_code": 127}
    if is_forgotten:  # the cluster was restarted
        del cluster.jobs[name]
    launcher.executor.jobs.forget()
    launcher.check()
    status = run_status.read_status(folder)
    assert status.state == "failed"
    assert "python: not found" in status.message
    assert not launcher.started


def test_a_run_that_is_resumed_before_its_end_is_noticed_stays_queued(outputs, cluster):
    folder, launcher, name = submit(cluster, "back again")
    run_requests.withdraw(folder, "queued")
    log = events.EventLog(folder / "events.jsonl")
    log.append(events.Launched(1, "0"))
    log.append(events.Stopped(0, ""))
    cluster.jobs[name] |= {"status": "SUCCEEDED", "driver_exit_code": 0}
    run_requests.request(folder, "queued")
    launcher.executor.jobs.forget()
    launcher.check()
    assert run_requests.requested(folder, "queued")
    assert len(cluster.jobs) == 2
    assert runs.status(folder).state == "queued"


def test_jobs_are_listed_at_most_once_per_interval(outputs, cluster):
    _, launcher, _ = submit(cluster, "patient")
    listed = []
    list_jobs = launcher.executor.jobs.function
    launcher.executor.jobs.function = lambda: listed.append(1) or list_jobs()
    launcher.executor.jobs.forget()
    for _ in range(5):
        launcher.check()
    assert len(listed) == 1


def test_an_unreachable_cluster_is_reported_and_the_run_stays_queued(outputs, cluster):
    folder = add_to_queue("patient")
    launcher = queue.Launcher(connect(cluster))
    cluster.is_reachable = False
    with pytest.raises(ClusterError, match="http://head:8265"):
        launcher.check()
    assert run_requests.requested(folder, "queued")
    cluster.is_reachable = True
    launcher.check()
    assert len(cluster.jobs) == 1


def test_a_local_run_that_is_withdrawn_at_the_last_moment_does_not_begin(outputs):
    folder = add_to_queue("second thoughts")
    launcher = queue.Launcher()
    launcher.check()
    process = launcher.executor.process
    run_requests.withdraw(folder, "queued")
    launcher.check()
    assert process.wait(60) != 0
    run_requests.request(folder, "queued")  # queued again before the end is noticed
    launcher._launch = launcher.started.setdefault  # marks the run as started without a process
    launcher.check()
    assert run_status.read_status(folder).state == "queued"
    assert launcher.executor.process is None
    run_requests.withdraw(folder, "queued")
    assert run_status.read_status(folder).state == "new"


@pytest.mark.skipif(
    find_spec("ray") is None,
    reason="the extra `ray` (240 MB) is not installed: pip install -c constraints.txt -e .[ray]",
)
def test_two_nodes_train_the_queue(tiny_run, outputs):
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "num_gpus": 1, "include_dashboard": True, "dashboard_port": 8299}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=1, num_gpus=1)
        folders = []
        for i in range(4):
            run_id = run_actions.start(tiny_run({"name": f"on ray {i}"}))
            folders.append(run_folder.runs_folder() / run_id)
        launcher = queue.Launcher(RayJobs(f"http://{cluster.head_node.webui_url}"))
        launcher.check()
        run_requests.withdraw(folders[3], "queued")
        trained = folders[:3]
        wait_for(lambda: launcher.check() or all(map(has_finished, trained)), "three runs", 300)
        jobs = launcher.executor._send("GET", "/api/jobs/")
        assert len({job["driver_node_id"] for job in jobs if job["driver_node_id"]}) == 2
        for folder in trained:
            status = run_status.read_status(folder)
            assert status.state == "finished", (folder / "log.txt").read_text()
            assert (folder / status.finished.file).is_file()
            assert (folder / "log.txt").read_text()
            assert len(status.losses) == 6
        assert run_status.read_status(folders[3]).state == "new"
        wait_for(lambda: launcher.check() or not launcher.started, "the end of all jobs", 300)
    finally:
        cluster.shutdown()


def has_finished(folder) -> bool:
    return run_status.read_status(folder).state == "finished"

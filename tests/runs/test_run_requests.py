"""Requests to a run, and the queue."""

from pathlib import Path

import pytest

from trainer import config
from trainer.runs import run_folder, run_requests, run_status


@pytest.fixture
def folder(outputs):
    return run_folder.create(config.RunConfig(name="maya"))


def test_a_request_is_there_until_it_is_taken(folder):
    assert not run_requests.requested(folder, "save")
    run_requests.request(folder, "save")
    assert run_requests.requested(folder, "save")
    assert not run_requests.requested(folder, "sample")
    assert run_requests.take(folder, "save")
    assert not run_requests.take(folder, "save")


def test_a_request_can_be_withdrawn_twice(folder):
    run_requests.request(folder, "stop")
    run_requests.withdraw(folder, "stop")
    run_requests.withdraw(folder, "stop")
    assert not run_requests.requested(folder, "stop")


def test_the_queue_has_the_order_of_the_requests(outputs):
    folders = [run_folder.create(config.RunConfig(name=name)) for name in "cab"]
    for folder in folders:
        run_requests.request(folder, "queued")
    assert run_requests.queue() == folders
    assert run_status.read_status(folders[0]).state == "queued"


def test_a_request_that_is_withdrawn_while_the_queue_is_read_is_left_out(folder, monkeypatch):
    other = run_folder.create(config.RunConfig(name="other"))
    for each in (folder, other):
        run_requests.request(each, "queued")
    assert run_requests.queue() == [folder, other]
    read_text = Path.read_text

    def withdraw_first(path, *args, **options):
        run_requests.withdraw(folder, "queued")
        return read_text(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", withdraw_first)
    assert run_requests.queue() == [other]

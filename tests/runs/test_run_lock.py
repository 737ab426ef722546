"""Locks: one trainer for each run, one run for each device."""

import multiprocessing
import os
import signal

import pytest
from filelock import Timeout

from trainer import config
from trainer.errors import StateError
from trainer.runs import events, run_folder, run_lock


@pytest.fixture
def folder(outputs):
    return run_folder.create(config.RunConfig(name="maya"))


def hold(folder, ready):
    lock = run_lock.acquire(folder)
    ready.set()
    signal.pause()
    lock.release()


def test_a_second_trainer_is_refused_until_the_first_one_dies(folder):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=hold, args=(folder, ready), daemon=True)
    holder.start()
    assert ready.wait(60)
    log = events.EventLog(folder / "events.jsonl")
    log.append(events.Launched(1, "an earlier trainer"))
    log.append(events.Launched(holder.pid, "0"))
    assert run_lock.is_alive(folder)
    with pytest.raises(StateError, match=f"Process {holder.pid} is already training"):
        run_lock.acquire(folder)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert not run_lock.is_alive(folder)
    run_lock.acquire(folder).release()


def test_a_run_without_a_lock_file_is_not_alive(folder):
    assert not run_lock.is_alive(folder)
    assert not (folder / ".lock").exists(), "looking at a run changes nothing"


def test_a_folder_that_cannot_be_locked_is_an_error(folder):
    (folder / ".lock").mkdir()
    with pytest.raises(StateError, match="Cannot write to the run folder"):
        run_lock.acquire(folder)


def test_all_users_share_the_device(outputs, monkeypatch):
    paths = set()
    for user in ("", "maya", "otto"):
        monkeypatch.setattr(run_folder, "current_user", lambda user=user: user)
        paths.add(run_lock.device_lock().lock_file)
    assert paths == {str(outputs / ".device.lock")}


def test_each_slot_of_a_cluster_is_a_device(outputs, monkeypatch):
    with run_lock.device_lock():
        monkeypatch.setenv("ATELIER_SLOT", "gpu 1")
        run_lock.device_lock().acquire(timeout=0).lock.release()
        monkeypatch.delenv("ATELIER_SLOT")
        with pytest.raises(Timeout):
            run_lock.device_lock().acquire(timeout=0)

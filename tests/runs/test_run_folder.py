"""The run folder as the interface: what is written there is what a page shows, whoever wrote it and however it ended."""

import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from trainer import config
from trainer.errors import StateError
from trainer.runs import events, run_folder, run_lock, run_requests, run_status
from trainer.runs.events import (
    AdapterSaved,
    EventLog,
    Failed,
    Finished,
    Launched,
    Progress,
    SampleSaved,
    Started,
    StepDone,
    Stopped,
    Validated,
)


@pytest.fixture
def folder(outputs):
    return run_folder.create(config.RunConfig(name="maya"))


def started(step: int = 0) -> Started:
    return Started(
        step=step,
        total_steps=10,
        pictures=4,
        held_out=0,
        trainable_parameters=1,
        device="CPU",
        precision="fp32",
        attention="torch",
        family="x",
    )


def write(folder, *happened):
    log = EventLog(folder / "events.jsonl")
    for event in happened:
        log.append(event)
    return log


def test_events_come_back_as_they_were(folder):
    happened = [
        Launched(1, "0"),
        started(),
        StepDone(1, 0.5, 1e-4, 0.1),
        SampleSaved(1, "żółć \n 😀", 3, "samples/a.png"),
        AdapterSaved(1, "a", None),
    ]
    write(folder, *happened)
    assert list(events.read_events(folder / "events.jsonl")) == happened


def test_cut_and_foreign_lines_are_skipped_and_swallow_nothing(folder):
    path = folder / "events.jsonl"
    write(folder, Launched(1, "0"))
    with open(path, "ab") as file:
        file.write(
            b'{"event": "FromTheFuture", "x": 1}\n[]\nnull\n{"event": "StepDone", "step": 1}\n{"event": "Ste'
        )
    write(folder, Failed("late"))
    assert [type(e) for e in events.read_events(path)] == [Launched, Failed]


def test_the_same_name_never_overwrites(outputs):
    folders = [run_folder.create(config.RunConfig(name="maya")) for _ in range(3)]
    assert len(set(folders)) == 3


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "..",
        "a/b\\c",
        "x" * 80,
        "\n",
        "-rf",
        "$(id)",
        "C:\\x",
        "żółć 😀",
        "a\x00b",
        ".",
    ],
)
def test_any_name_gives_a_folder_inside_the_runs(outputs, name):
    folder = run_folder.create(config.RunConfig(name=name))
    assert folder.parent == run_folder.runs_folder()
    assert config.load(folder / "run.toml").name == name


@pytest.mark.parametrize(
    "happened, state",
    [
        ([], "new"),
        ([Launched(1, "0"), started(), StepDone(1, 1.0, 1e-4, 0.1)], "interrupted"),
        ([Launched(1, "0"), Progress("caching", 1, 4)], "interrupted"),
        ([Launched(1, "0"), Failed("no room")], "failed"),
        ([Launched(1, "0"), started(), Stopped(3, "a")], "stopped"),
        ([Launched(1, "0"), started(), Finished(10, "a", 10, 1.0)], "finished"),
    ],
)
def test_the_state_of_a_run_without_a_trainer(folder, happened, state):
    write(folder, *happened)
    assert run_status.read_status(folder).state == state


def test_the_state_of_a_run_with_a_trainer(folder):
    lock = run_lock.acquire(folder)
    write(folder, Launched(os.getpid(), "0"), Progress("caching", 1, 4))
    assert run_status.read_status(folder).state == "caching"
    write(folder, started(), StepDone(1, 1.0, 1e-4, 2.0))
    status = run_status.read_status(folder)
    assert (status.state, status.step, status.seconds_left) == ("training", 1, 18.0)
    run_requests.request(folder, "stop")
    assert run_status.read_status(folder).state == "stopping"
    lock.release()


def test_what_a_resumed_run_repeats_is_superseded(folder):
    write(
        folder,
        started(),
        *(StepDone(step, float(step), 1e-4, 0.1) for step in range(1, 7)),
        Validated(6, 0.3),
        AdapterSaved(6, "a-6", 0.3),
        SampleSaved(6, "p", 1, "s6"),
    )
    write(folder, started(step=4), StepDone(5, 50.0, 1e-4, 0.1))
    status = run_status.read_status(folder)
    assert status.losses == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0)]
    assert not status.adapters and not status.samples and not status.validation_losses


def test_the_best_save_is_told_by_what_is_held_out_and_only_by_that(folder):
    saves = [(2, 0.3), (4, 0.2), (6, 0.25)]
    happened = [
        event
        for step, loss in saves
        for event in (Validated(step, loss), AdapterSaved(step, f"{step}", loss))
    ]
    write(folder, started(), *happened)
    assert run_status.read_status(folder).best_step is None
    write(folder, replace(started(), held_out=1), *happened, Validated(8, 0.1))
    assert run_status.read_status(folder).best_step == 4, "step 8 was measured, but not saved"


def _hold(folder, ready):
    lock = run_lock.acquire(folder)
    ready.set()
    signal.pause()
    lock.release()


def test_a_second_trainer_is_refused_and_a_dead_one_is_succeeded(folder):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(folder, ready), daemon=True)
    holder.start()
    assert ready.wait(60)
    write(folder, Launched(holder.pid, "0"))
    assert run_lock.is_alive(folder)
    with pytest.raises(StateError, match=f"Process {holder.pid} is already training"):
        run_lock.acquire(folder)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert not run_lock.is_alive(folder)
    run_lock.acquire(folder).release()


def test_the_queue_is_in_the_order_of_asking(outputs):
    folders = [run_folder.create(config.RunConfig(name=name)) for name in "cab"]
    for folder in folders:
        run_requests.request(folder, "queued")
    assert list(run_requests.queue()) == folders
    assert run_status.read_status(folders[0]).state == "queued"


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="Cannot create the run folder"):
        run_folder.create(config.RunConfig(), tmp_path / "file" / "runs")


def test_a_run_is_read_on_and_shows_what_a_whole_reading_shows(folder):
    """Also across a line that is half written, a resumed run, and another run under the same name."""
    replay, log, path = run_status.Replay(folder), write(folder), folder / "events.jsonl"
    assert replay.status() == run_status.read_status(folder)
    for event in (
        Launched(1, "0"),
        started(),
        *(StepDone(step, 1.0, 1e-4, 0.1) for step in range(1, 5)),
        started(step=2),
        Failed("no room"),
    ):
        log.append(event)
        assert replay.status() == run_status.read_status(folder)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"event": "Step')
    assert replay.status().state == "failed"
    with open(path, "ab") as file:
        file.write(
            b'Done", "step": 3, "loss": 0.5, "learning_rate": 0.1, "seconds": 0.1, "time": 1.0}\n'
        )
    assert replay.status().step == 3 and replay.status() == run_status.read_status(folder)
    path.unlink()
    assert replay.status().state == "new"
    write(folder, Launched(1, "0"), Finished(10, "a", 10, 1.0))
    assert replay.status().state == "finished"


def test_only_what_is_new_is_read(folder, monkeypatch):
    log, replay, parsed = write(folder, Launched(1, "0"), started()), run_status.Replay(folder), []
    replay.status()
    real = events.parse_event
    monkeypatch.setattr(events, "parse_event", lambda line: parsed.append(line) or real(line))
    log.append(StepDone(1, 1.0, 1e-4, 0.1))
    replay.status(), replay.status()
    assert len(parsed) == 1


def test_a_request_that_is_withdrawn_while_the_queue_is_looked_at_is_left_out(folder, monkeypatch):
    other = run_folder.create(config.RunConfig(name="other"))
    for each in (folder, other):
        run_requests.request(each, "queued")
    assert list(run_requests.queue()) == [folder, other]
    read = Path.read_text

    def withdrawn_first(path, *args, **options):
        run_requests.withdraw(folder, "queued")
        return read(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", withdrawn_first)
    assert list(run_requests.queue()) == [other]

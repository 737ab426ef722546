"""The event log: what is written can be read, also beside cut lines and unknown events."""

import errno
import os

import pytest

from trainer.runs import events
from trainer.runs.events import AdapterSaved, EventLog, Failed, Launched, SampleSaved, StepDone


@pytest.fixture
def path(tmp_path):
    return tmp_path / "events.jsonl"


def test_events_are_read_as_they_were_written(path):
    written = [
        Launched(1, "0"),
        StepDone(1, 0.5, 1e-4, 0.1),
        SampleSaved(1, "żółć \n 😀", 3, "samples/a.png"),
        AdapterSaved(1, "a", None),
    ]
    log = EventLog(path)
    for event in written:
        log.append(event)
    assert list(events.read_events(path)) == written


def test_a_log_that_does_not_exist_is_empty(path):
    assert list(events.read_events(path)) == []


def test_cut_lines_and_unknown_events_are_skipped(path):
    EventLog(path).append(Launched(1, "0"))
    with open(path, "ab") as file:
        file.write(b'{"event": "FromTheFuture", "x": 1}\n[]\nnull\n')
        file.write(b'{"event": "StepDone", "step": 1}\n{"event": "Ste')
    EventLog(path).append(Failed("late"))
    assert [type(event) for event in events.read_events(path)] == [Launched, Failed]


def test_unknown_fields_are_skipped_and_missing_ones_have_defaults(path):
    path.write_text('{"event": "Stopped", "step": 4, "file": "a", "mood": "good", "time": 1.0}\n')
    (event,) = events.read_events(path)
    assert event == events.Stopped(4, "a", 0, time=1.0)


def test_listeners_are_called_after_the_event_is_written(path):
    log = EventLog(path)
    counts = []
    log.listeners.append(lambda event: counts.append(len(list(events.read_events(path)))))
    log.append(Launched(1, "0"))
    log.append(Failed("x"))
    assert counts == [1, 2]


def test_a_listener_may_remove_itself(path):
    log = EventLog(path)
    called = []

    def once(event):
        called.append("once")
        log.listeners.remove(once)

    log.listeners += [once, lambda event: called.append("always")]
    log.append(Failed("x"))
    log.append(Failed("y"))
    assert called == ["once", "always", "always"]


def test_a_line_that_does_not_fit_on_the_disk_is_an_error(path, monkeypatch):
    log = EventLog(path)
    monkeypatch.setattr(os, "write", lambda descriptor, line: len(line) - 1)
    with pytest.raises(OSError) as caught:
        log.append(Failed("x"))
    assert caught.value.errno == errno.ENOSPC


def test_a_silent_log_writes_nothing_and_calls_nobody():
    log = events.SilentLog()
    log.listeners.append(lambda event: pytest.fail("called"))
    log.append(Failed("x"))

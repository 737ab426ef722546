"""The status of a run, computed from its events and its lock, whoever wrote them."""

import os
from collections import namedtuple
from dataclasses import replace

import pytest

from trainer import config
from trainer.runs import events, run_folder, run_lock, run_requests, run_status
from trainer.runs.events import (
    AdapterSaved,
    Continued,
    EndedEarly,
    EventLog,
    Failed,
    Finished,
    Launched,
    MemoryRelieved,
    Paused,
    Probed,
    Progress,
    RolledBack,
    SampleSaved,
    Started,
    StepDone,
    Stopped,
    TrainerDied,
    Validated,
    Warned,
)

LAUNCHED = Launched(1, "0")
WITHOUT_STATUS = {"StateSaved", "Captioned", "CaptionsDone"}


def started(step=0, **changes):
    event = Started(
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
    return replace(event, **changes)


def steps(first, last, seconds=0.1):
    return [StepDone(step, float(step), 1e-4, seconds) for step in range(first, last + 1)]


@pytest.fixture
def folder(outputs):
    return run_folder.create(config.RunConfig(name="maya"))


def write(folder, *written):
    log = EventLog(folder / "events.jsonl")
    for event in written:
        log.append(event)
    return log


def status_after(*written):
    """Returns the status after these events, without a folder."""
    status = run_status.RunStatus("maya")
    for event in written:
        run_status.apply_event(status, event)
    return status


def test_every_event_that_concerns_a_run_changes_its_status():
    handled = {event_type.__name__ for event_type in run_status.HANDLERS}
    assert handled == set(events.EVENT_TYPES) - WITHOUT_STATUS


@pytest.mark.parametrize(
    "written, state",
    [
        ([], "new"),
        ([LAUNCHED, started(), StepDone(1, 1.0, 1e-4, 0.1)], "interrupted"),
        ([LAUNCHED, Progress("caching", 1, 4)], "interrupted"),
        ([LAUNCHED, started(), Paused(3)], "interrupted"),
        ([LAUNCHED, Failed("no room")], "failed"),
        ([LAUNCHED, started(), Stopped(3, "a")], "stopped"),
        ([LAUNCHED, started(), Finished(10, "a", 10, 1.0)], "finished"),
    ],
)
def test_the_state_of_a_run_without_a_trainer(folder, written, state):
    write(folder, *written)
    status = run_status.read_status(folder)
    assert status.state == state
    assert status.can_resume == (state in ("interrupted", "failed", "stopped"))
    assert not status.is_active


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


def test_a_run_with_a_trainer_is_not_queued(folder):
    """The trainer withdraws the request only after its first event."""
    run_requests.request(folder, "queued")
    assert run_status.read_status(folder).state == "queued"
    lock = run_lock.acquire(folder)
    write(folder, Launched(os.getpid(), "0"))
    assert run_status.read_status(folder).state == "loading"
    lock.release()


def test_progress_is_the_state_and_its_counts():
    status = status_after(LAUNCHED, Progress("downloading", 3, 10))
    assert (status.state, status.phase_done, status.phase_total) == ("downloading", 3, 10)


def test_a_pause_ends_when_training_continues():
    paused = [LAUNCHED, started(), *steps(1, 2), Paused(2)]
    assert status_after(*paused).state == "paused"
    assert status_after(*paused, Continued(2)).state == "training"


def test_a_step_adds_to_the_curves():
    status = status_after(LAUNCHED, started(), StepDone(1, 0.5, 1e-4, 0.25))
    assert status.losses == [(1, 0.5)]
    assert status.learning_rates == [(1, 1e-4)]
    assert status.step_seconds == [0.25]


def test_a_new_start_forgets_how_the_last_one_ended():
    status = status_after(
        LAUNCHED,
        started(),
        TrainerDied(-9),
        Finished(10, "a", 10, 1.0),
        Failed("no room"),
        Launched(2, "0", "boot", time=7.0),
    )
    assert (status.state, status.message, status.file) == ("loading", "", "")
    assert status.finished is None and status.exit_code is None
    assert (status.boot, status.launched_at) == ("boot", 7.0)


@pytest.mark.parametrize("end", [started(step=4), RolledBack(4, 6, 0.5, "back to step 4")])
def test_going_back_to_a_step_forgets_what_came_after(end):
    later = [
        Validated(6, 0.3),
        AdapterSaved(6, "a-6", 0.3),
        SampleSaved(6, "p", 1, "s6"),
        Probed(6, "p"),
        EndedEarly(6, 4, "no longer falling"),
    ]
    earlier = [Validated(3, 0.4), AdapterSaved(3, "a-3"), SampleSaved(3, "p", 1, "s3"), Probed(3)]
    status = status_after(LAUNCHED, started(), *steps(1, 6), *earlier, *later, end)
    assert status.step == 4
    assert [step for step, _ in status.losses] == [1, 2, 3, 4]
    assert [step for step, _ in status.learning_rates] == [1, 2, 3, 4]
    for entries in (status.validations, status.adapters, status.samples, status.probes):
        assert [entry.step for entry in entries] == [3]
    assert status.ended_early == ""


def test_repeated_steps_replace_the_first_ones(folder):
    write(folder, started(), *steps(1, 6))
    write(folder, started(step=4), StepDone(5, 50.0, 1e-4, 0.1))
    losses = run_status.read_status(folder).losses
    assert losses == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0)]


def test_a_repeated_validation_sample_probe_or_save_replaces_the_first_one():
    first = [Validated(3, 0.4), SampleSaved(3, "p", 1, "s"), Probed(3), AdapterSaved(3, "a")]
    second = [
        Validated(3, 0.2),
        SampleSaved(3, "q", 1, "s"),
        Probed(3, "q"),
        AdapterSaved(3, "a", 0.2),
    ]
    status = status_after(LAUNCHED, started(), *first, *second)
    assert status.validations == [second[0]]
    assert status.samples == [second[1]]
    assert status.probes == [second[2]]
    assert status.adapters == [second[3]]


def test_warnings_fallbacks_and_rollbacks_are_shown_as_warnings():
    status = status_after(
        Warned("one"),
        MemoryRelieved(1, "step", "split", "two"),
        RolledBack(0, 4, 0.5, "three"),
    )
    assert status.warnings == ["one", "two", "three"]


@pytest.mark.parametrize(
    "end, file_step",
    [
        (Finished(10, "a", 8, 1.0, file_step=8), 8),
        (Finished(10, "a", 8, 1.0), 10),
        (Stopped(10, "a", file_step=8), 8),
        (Stopped(10, "a"), 10),
    ],
)
def test_the_finished_file_of_an_older_version_is_the_last_save(end, file_step):
    status = status_after(LAUNCHED, started(), *steps(1, 10), end)
    assert (status.step, status.file, status.file_step) == (10, "a", file_step)


def test_the_adapter_is_the_finished_file_or_the_latest_save():
    saved = [LAUNCHED, started(), AdapterSaved(4, "a-4"), AdapterSaved(8, "a-8")]
    assert status_after(LAUNCHED).adapter == ""
    assert status_after(*saved).adapter == "a-8"
    assert status_after(*saved, Finished(8, "a", 4, 1.0)).adapter == "a"


def test_the_best_save_is_a_save_and_needs_a_validation_set():
    saves = []
    for step, loss in ((2, 0.3), (4, 0.2), (6, 0.25)):
        saves += [Validated(step, loss), AdapterSaved(step, f"{step}", loss)]
    assert status_after(started(), *saves).best_step is None
    status = status_after(started(held_out=1), *saves, Validated(8, 0.1))
    assert status.best_step == 4, "step 8 was validated but not saved"


def test_validation_losses_leave_out_what_is_not_finite():
    status = status_after(Validated(1, 0.5), Validated(2, float("nan")), Validated(3, float("inf")))
    assert status.validation_losses == [(1, 0.5)]


def test_one_slow_step_does_not_change_the_speed():
    status = status_after(started(images_per_step=4), *steps(1, 6, seconds=2.0))
    status.step_seconds[0] = 60.0
    assert status.seconds_per_step == 2.0
    assert status.images_per_second == 2.0


def test_the_time_left_includes_the_remaining_saves():
    """Steps of 1 second; a save of 5 seconds after steps 5 and 10."""
    timed = [replace(started(saves=2), time=0.0)]
    for step in range(1, 6):
        timed.append(StepDone(step, 1.0, 1e-4, 1.0, time=float(step)))
    status = status_after(*timed)
    assert status.seconds_left == 5.0, "no save was measured yet"
    save = [Validated(5, 0.5, time=7.0), AdapterSaved(5, "a", time=10.0)]
    after_save = [*timed, *save, StepDone(6, 1.0, 1e-4, 1.0, time=11.0)]
    status = status_after(*after_save)
    assert status.seconds_between_steps == [5.0]
    assert status.seconds_left == 4 * 1.0 + 1 * 5.0

    rest = [StepDone(step, 1.0, 1e-4, 1.0, time=5.0 + step) for step in range(7, 11)]
    assert status_after(*after_save, *rest).seconds_left == 5.0, "the last save is still to come"


def test_a_pause_does_not_count_as_the_time_of_a_save():
    status = status_after(
        replace(started(), time=0.0),
        StepDone(1, 1.0, 1e-4, 1.0, time=1.0),
        Validated(1, 0.5, time=2.0),
        Paused(1, time=3.0),
        Continued(1, time=900.0),
        StepDone(2, 1.0, 1e-4, 1.0, time=901.0),
    )
    assert status.seconds_between_steps == []


def test_a_clock_that_goes_back_gives_no_negative_time():
    status = status_after(
        replace(started(), time=1000.0),
        Validated(0, 0.5, time=1001.0),
        StepDone(1, 1.0, 1e-4, 1.0, time=5.0),
    )
    assert status.seconds_between_steps == [0.0]


@pytest.mark.parametrize(
    "code, expected",
    [
        (-9, "memory ran out"),
        (137, "memory ran out"),
        (-11, "crashed in a library or driver (exit code -0xb)"),
        (139, "crashed"),
        (0xC0000005, "crashed"),
        (-15, "terminated before it could save"),
        (-2, "terminated before it could save"),
        (77, "exit code 77"),
    ],
)
def test_exit_codes_are_explained(code, expected):
    assert expected in run_status.describe_exit_code(code)


DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.mark.parametrize(
    "log, free, expected",
    [
        ("", 2**30, "killed, most often by the system because memory ran out"),
        ("Fatal Python error: Segmentation fault\n", 2**30, "crashed in a library or driver"),
        ("", 2**20 - 1, "The disk is full"),
    ],
)
def test_an_interruption_is_explained_by_the_log_and_the_disk(
    folder, monkeypatch, log, free, expected
):
    monkeypatch.setattr(run_status, "disk_usage", lambda path: DiskUsage(2**40, 0, free))
    (folder / "log.txt").write_text(log)
    write(folder, LAUNCHED, started(), *steps(1, 2))
    message = run_status.read_status(folder).message
    assert expected in message
    assert message.endswith("The last checkpoint is kept; press Resume.")


def test_a_replay_shows_the_same_as_reading_all_events(folder):
    replay, log = run_status.Replay(folder), write(folder)
    assert replay.status() == run_status.read_status(folder)
    written = [LAUNCHED, started(), *steps(1, 4), started(step=2), Failed("no room")]
    for event in written:
        log.append(event)
        assert replay.status() == run_status.read_status(folder)


def test_a_replay_waits_for_the_end_of_a_line(folder):
    replay = run_status.Replay(folder)
    write(folder, LAUNCHED, started(), Failed("no room"))
    with open(folder / "events.jsonl", "ab") as file:
        file.write(b'{"event": "Step')
    assert replay.status().state == "failed"
    with open(folder / "events.jsonl", "ab") as file:
        file.write(
            b'Done", "step": 3, "loss": 0.5, "learning_rate": 0.1, "seconds": 0.1, "time": 1.0}\n'
        )
    assert replay.status().step == 3
    assert replay.status() == run_status.read_status(folder)


def test_a_replay_starts_over_if_the_run_is_another_one(folder):
    replay = run_status.Replay(folder)
    write(folder, LAUNCHED, started(), *steps(1, 4))
    assert replay.status().step == 4
    (folder / "events.jsonl").unlink()
    assert replay.status().state == "new"
    write(folder, LAUNCHED, Finished(10, "a", 10, 1.0))
    assert replay.status().state == "finished"
    assert replay.status().losses == []


def test_a_replay_starts_over_if_the_log_became_shorter(folder):
    replay, path = run_status.Replay(folder), folder / "events.jsonl"
    write(folder, LAUNCHED, started(), *steps(1, 4))
    assert replay.status().step == 4
    lines = path.read_bytes().splitlines(keepends=True)
    # Written in place, so that the inode stays.
    path.write_bytes(b"".join(lines[:4]))
    assert replay.status().step == 2


def test_a_replay_parses_each_event_once(folder, monkeypatch):
    log, replay = write(folder, LAUNCHED, started()), run_status.Replay(folder)
    replay.status()
    parsed = []
    parse_event = events.parse_event

    def counting(line):
        parsed.append(line)
        return parse_event(line)

    monkeypatch.setattr(events, "parse_event", counting)
    log.append(StepDone(1, 1.0, 1e-4, 0.1))
    replay.status()
    replay.status()
    assert len(parsed) == 1


def test_a_replay_without_curves_keeps_the_last_steps(folder):
    replay = run_status.Replay(folder, curves=False)
    count = run_status.SPEED_WINDOW + 20
    write(folder, LAUNCHED, started(), *steps(1, count))
    status = replay.status()
    assert status.step == count
    assert [step for step, _ in status.losses] == list(range(21, count + 1))
    assert len(status.step_seconds) == len(status.learning_rates) == run_status.SPEED_WINDOW


def test_earlier_results_of_a_replay_keep_their_lists_of_saves(folder):
    replay, log = run_status.Replay(folder), write(folder, LAUNCHED, started())
    log.append(AdapterSaved(2, "a-2"))
    earlier = replay.status()
    log.append(AdapterSaved(4, "a-4"))
    replay.status()
    assert [saved.step for saved in earlier.adapters] == [2]

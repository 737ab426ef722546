"""The terminal display: one line for each event that a person should see."""

import io
import sys
from dataclasses import replace

import pytest

from trainer import config
from trainer.runs import events, run_folder
from trainer.runs.console import TerminalLog

STARTED = events.Started(
    step=0,
    total_steps=10,
    pictures=9,
    held_out=3,
    trainable_parameters=12_000,
    device="CPU",
    precision="fp32",
    attention="torch",
    family="Stable Diffusion 1.x",
)


@pytest.fixture
def log(outputs):
    folder = run_folder.create(config.RunConfig(name="maya"))
    log = TerminalLog(folder / "events.jsonl")
    yield log
    log.close()


@pytest.mark.parametrize(
    "event, line",
    [
        (
            STARTED,
            "Stable Diffusion 1.x on CPU, fp32, torch; 9 images, 3 more in the validation set; "
            "12,000 parameters to train",
        ),
        (
            replace(STARTED, parameters={"unet": 25}, base_parameters={"unet": 1000}),
            "2.50% of the unet",
        ),
        (events.Progress("downloading", 1200, 4000), "the base model: 1,200/4,000 MB"),
        (events.Progress("caching", 1, 4), "Caching images and captions: 1/4"),
        (events.Progress("waiting"), "Another run uses the device"),
        (events.AdapterSaved(3, "a-3.safetensors"), "Step 3: saved a-3.safetensors"),
        (events.AdapterSaved(3, "a-3", 0.12345), "Step 3: saved a-3, validation loss 0.1235"),
        (events.Warned("too dark"), "Warning: too dark"),
        (events.MemoryRelieved(1, "step", "split", "in two parts"), "Warning: in two parts"),
        (events.RolledBack(2, 6, 0.5, "back to step 2"), "Warning: back to step 2"),
        (events.Paused(4), "Paused after step 4"),
        (events.Stopped(4, "a"), "Stopped after step 4"),
        (events.Probed(4, "p", leak=0.75), "without its trigger word"),
        (events.EndedEarly(4, 2, "no longer falling"), "no longer falling"),
        (
            events.Finished(10, "a", 8, 61.4, file_step=8),
            "10 steps in 61 s; a is the save of step 8",
        ),
    ],
)
def test_an_event_is_printed_in_a_line(log, capsys, event, line):
    log.append(event)
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    "event",
    [
        events.Launched(1, "0"),
        events.Progress("loading"),
        events.Validated(1, 0.5),
        events.Probed(4, "p", leak=0.5),
        events.Probed(0, "p"),
        events.Continued(4),
    ],
)
def test_other_events_print_nothing(log, capsys, event):
    log.append(event)
    assert capsys.readouterr().out == ""


def test_every_event_is_also_written(log):
    log.append(events.Launched(1, "0"))
    log.append(events.Paused(4))
    written = list(events.read_events(log.path))
    assert [type(event) for event in written] == [events.Launched, events.Paused]


def test_the_progress_bar_starts_at_the_step_of_the_checkpoint(log, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    log.append(replace(STARTED, step=4))
    log.append(events.StepDone(5, 0.5, 1e-4, 0.1))
    assert (log.bar.initial, log.bar.n, log.bar.total) == (4, 5, 10)


def test_an_output_that_is_not_a_terminal_has_no_progress_bar(log):
    log.append(STARTED)
    assert log.bar.disable


def test_a_terminal_with_a_small_character_set_gets_escapes(log, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    log.append(events.Warned("żółć"))
    terminal.flush()
    assert terminal.buffer.getvalue() == b"Warning: \\u017c\\xf3\\u0142\\u0107\n"

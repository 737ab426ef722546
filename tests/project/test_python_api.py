"""`from trainer import RunConfig, run`: what a script or a notebook uses."""

import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest

import trainer
from trainer import RunConfig, TrainerError, run
from trainer.errors import ConfigError
from trainer.runs import run_folder, run_requests, run_status
from trainer.runs.events import StepDone
from trainer.training.runner import run_in

ROOT = Path(__file__).parents[2]


def test_importing_the_engine_reads_no_torch():
    code = "import sys; from trainer import RunConfig, run; RunConfig(); print([m for m in ('torch', 'diffusers') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
        ).stdout.strip()
        == "[]"
    )
    assert set(trainer.__all__) <= {name for name in trainer.__all__ if getattr(trainer, name)}
    with pytest.raises(ImportError):
        from trainer import nothing_of_that_name  # noqa: F401


def test_a_run_gives_its_files_and_tells_how_far_it_is(tiny_run, capsys):
    told = []
    result = run(tiny_run(), progress=told.append)
    assert isinstance(tiny_run(), RunConfig) and result.status.state == "finished"
    assert result.adapter == result.folder / "tiny.safetensors" and result.adapter.is_file()
    assert (
        [event.step for event in told if isinstance(event, StepDone)]
        == [step for step, _ in result.status.losses]
        == [1, 2, 3, 4, 5, 6]
    )
    assert "step" not in capsys.readouterr().out, "the callback stands in place of the bar"


def test_it_stops_goes_on_and_runs_beside_the_main_thread(tiny_run):
    def stop_after_two(event):
        if isinstance(event, StepDone) and event.step == 2:
            run_requests.request(next(iter(run_folder.list_runs())), "stop")

    results = []
    thread = threading.Thread(
        target=lambda: results.append(run(tiny_run(), progress=stop_after_two))
    )
    thread.start()
    thread.join()
    (stopped,) = results
    assert (stopped.status.state, stopped.status.step, stopped.adapter.name) == (
        "stopped",
        2,
        "tiny.safetensors",
    )
    assert run(stopped.folder).status.state == "finished"


def test_a_run_leaves_the_queue_only_when_it_is_seen_at_work(tiny_run):
    """Else the page, which looks each moment, would end it as one that a person has taken out."""
    folder = run_folder.create(tiny_run())
    run_requests.request(folder, "queued")
    seen = []

    def look(event):
        seen.append(
            (run_requests.requested(folder, "queued"), run_status.read_status(folder).launched_at > 0)
        )
        if len(seen) == 2:
            raise TrainerError("enough")

    with pytest.raises(TrainerError, match="enough"):
        run(folder, progress=look)
    assert seen[:2] == [(True, True), (False, True)]


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_leaves_no_model_behind(tiny_run, monkeypatch, fails):
    """The next one of a sweep or a notebook needs the room."""
    from trainer.training import loop

    left, prepare = [], loop.prepare

    def prepared(*values):
        session = prepare(*values)
        left.append(weakref.ref(session.model.base.denoiser))
        if fails:
            raise TrainerError("enough")
        return session

    monkeypatch.setattr(loop, "prepare", prepared)
    gc.disable()
    try:
        assert run_in(run_folder.create(tiny_run({"training.steps": 1, "saving.saves": 1}))) == int(
            fails
        )
        assert left[0]() is None
    finally:
        gc.enable()


def test_what_goes_wrong_is_raised_as_a_sentence(tiny_run, tmp_path):
    with pytest.raises(ConfigError, match="dataset.folder"):
        run(RunConfig())
    with pytest.raises(
        TrainerError, match=r"no such folder|is not a folder|does not exist|no pictures"
    ):
        run(tiny_run({"dataset.folder": str(tmp_path / "nothing")}))

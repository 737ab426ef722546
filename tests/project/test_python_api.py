"""`from trainer import RunConfig, run`, as scripts and notebooks use it."""

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


def test_importing_the_engine_loads_no_torch():
    code = (
        "import sys\n"
        "from trainer import RunConfig, run\n"
        "RunConfig()\n"
        "print([name for name in ('torch', 'diffusers') if name in sys.modules])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert ended.stdout.strip() == "[]"


def test_every_public_name_can_be_imported_and_no_other():
    assert all(getattr(trainer, name) is not None for name in trainer.__all__)
    with pytest.raises(ImportError):
        from trainer import nothing_of_that_name  # noqa: F401


def test_a_run_returns_its_files_and_reports_its_events(tiny_run, capsys):
    events = []
    result = run(tiny_run(), progress=events.append)
    assert result.status.state == "finished"
    assert result.adapter == result.folder / "tiny.safetensors"
    assert result.adapter.is_file()
    steps = [event.step for event in events if isinstance(event, StepDone)]
    assert steps == [step for step, _ in result.status.losses] == [1, 2, 3, 4, 5, 6]
    assert "step" not in capsys.readouterr().out, "the callback replaces the progress bar"


def test_a_run_in_a_thread_can_be_stopped_and_resumed(tiny_run):
    def stop_after_two(event):
        if isinstance(event, StepDone) and event.step == 2:
            (folder,) = run_folder.list_runs()
            run_requests.request(folder, "stop")

    results = []
    thread = threading.Thread(
        target=lambda: results.append(run(tiny_run(), progress=stop_after_two))
    )
    thread.start()
    thread.join()
    (stopped,) = results
    assert (stopped.status.state, stopped.status.step) == ("stopped", 2)
    assert stopped.adapter.name == "tiny.safetensors"
    assert run(stopped.folder).status.state == "finished"


def test_a_run_leaves_the_queue_after_its_first_event(tiny_run):
    """Without that event the page would believe that a person removed it from the queue."""
    folder = run_folder.create(tiny_run())
    run_requests.request(folder, "queued")
    seen = []

    def look(event):
        is_queued = run_requests.requested(folder, "queued")
        is_launched = run_status.read_status(folder).launched_at > 0
        seen.append((is_queued, is_launched))
        if len(seen) == 2:
            raise TrainerError("enough")

    with pytest.raises(TrainerError, match="enough"):
        run(folder, progress=look)
    assert seen[:2] == [(True, True), (False, True)]


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_leaves_no_model_in_memory(tiny_run, monkeypatch, fails):
    """The next run of a sweep or a notebook needs the memory."""
    from trainer.training import loop

    models, prepare = [], loop.prepare

    def prepare_and_watch(*values):
        session = prepare(*values)
        models.append(weakref.ref(session.model.base.denoiser))
        if fails:
            raise TrainerError("enough")
        return session

    monkeypatch.setattr(loop, "prepare", prepare_and_watch)
    folder = run_folder.create(tiny_run({"training.steps": 1, "saving.saves": 1}))
    gc.disable()
    try:
        assert run_in(folder) == int(fails)
        (model,) = models
        assert model() is None
    finally:
        gc.enable()


def test_a_missing_dataset_is_an_error_with_a_message(tiny_run, tmp_path):
    with pytest.raises(ConfigError, match="dataset.folder"):
        run(RunConfig())
    with pytest.raises(TrainerError, match="nothing is not a folder"):
        run(tiny_run({"dataset.folder": str(tmp_path / "nothing")}))

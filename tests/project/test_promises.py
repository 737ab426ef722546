"""The promises P1 to P19 and T1 to T12 of docs/reliability.md.

Each promise has tests. The ones that belong to no other file are here.
"""

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from app import __main__ as page
from app.jobs import queue, run_actions, trainer_process
from trainer import config
from trainer.runs import atomic_files, events, run_folder, run_lock, run_requests, run_status
from trainer.training.runner import STOPPED, run_in

ROOT = Path(__file__).parents[2]
HOSTILE = [
    "x; touch PWNED",
    "$(touch PWNED)",
    "`touch PWNED`",
    "--output_dir=/tmp/x",
    "-rf",
    "a\nb",
    '"',
    "'",
    "a\x00b",
    "żółć 😀",
]


def adapter_of(folder):
    return load_file(folder / run_status.read_status(folder).finished.file)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def at_step(monkeypatch, step, act):
    """Calls `act` right after a step."""
    append = events.EventLog.append

    def append_and_act(self, event):
        append(self, event)
        if isinstance(event, events.StepDone) and event.step == step:
            act()

    monkeypatch.setattr(events.EventLog, "append", append_and_act)


def test_every_promise_names_a_test_in_the_file_that_contains_it():
    rows = re.findall(
        r"^\| ([PT]\d+b?) \|.*?\| ([^|]+) \|$",
        (ROOT / "docs" / "reliability.md").read_text(),
        re.MULTILINE,
    )
    promises = {f"P{number}" for number in range(1, 20)}
    threats = {f"T{number}" for number in range(1, 13)} | {"T4b"}
    assert {name for name, _ in rows} == promises | threats
    sources = {path: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    missing = []
    for name, tests in rows:
        references = re.findall(r"`(test_\w+)` \(((?:browser/)?test_\w+\.py)\)", tests)
        assert len(references) == tests.count("`test_") > 0, name
        for function, file in references:
            files = [path for path in sources if path.as_posix().endswith(f"/{file}")]
            if not any(f"def {function}(" in sources[path] for path in files):
                missing.append((name, function, file))
    assert missing == []


def test_P02_files_are_synced_before_they_get_their_name(tmp_path, monkeypatch):
    """A power cut can drop whatever was not synced."""
    synced, renamed = set(), []
    fsync, replace = os.fsync, os.replace

    def record_sync(descriptor):
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def record_rename(source, target):
        source = Path(source)
        contents = [str(path) for path in source.rglob("*")] if source.is_dir() else []
        renamed.append((str(target), {str(source), *contents} <= synced))
        synced.discard(str(Path(target).parent))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_rename)
    atomic_files.atomic_write(tmp_path / "a", b"x")
    assert str(tmp_path) in synced
    with atomic_files.atomic_folder(tmp_path / "b") as temporary:
        (temporary / "c").write_bytes(b"x")
        (temporary / "d").write_bytes(b"x")
    assert str(tmp_path) in synced
    assert renamed == [(str(tmp_path / "a"), True), (str(tmp_path / "b"), True)]


def test_P04_a_signal_saves_the_present_step_and_resuming_gives_identical_weights(
    tiny_run, train_tiny, monkeypatch
):
    uninterrupted = adapter_of(train_tiny({"saving.state_every": 100}))
    folder = run_folder.create(tiny_run({"saving.state_every": 100}))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run_in(folder) == STOPPED
    assert run_status.read_status(folder).state == "stopped"
    assert (folder / "state" / "000004").is_dir()
    assert run_in(folder) == 0
    assert same(adapter_of(folder), uninterrupted)
    after = {number: signal.getsignal(number) for number in before}
    assert after == before, "the handlers are restored"


def test_P06_a_read_only_run_folder_is_refused_before_the_base_is_loaded(tiny_run, monkeypatch):
    from trainer.cli.main import main

    folder = run_folder.create(tiny_run())
    # A folder in place of the lock file has the effect of a read-only disk.
    (folder / ".lock").mkdir()
    monkeypatch.setattr("trainer.training.runner._train", lambda *_: pytest.fail("it started"))
    assert main(["resume", str(folder)]) == 1


def test_P09_images_that_change_during_a_run_change_nothing_and_are_named_at_resume(
    tiny_run, tiny_dataset, tmp_path, monkeypatch
):
    unchanged = run_folder.create(tiny_run())
    assert run_in(unchanged) == 0
    dataset = shutil.copytree(tiny_dataset, tmp_path / "copy")
    folder = run_folder.create(tiny_run({"dataset.folder": str(dataset)}))

    def change_dataset():
        (dataset / "01.png").unlink()
        (dataset / "02.txt").write_text("something else")

    with monkeypatch.context() as patch:
        at_step(patch, 2, change_dataset)
        assert run_in(folder) == 0
    assert same(adapter_of(folder), adapter_of(unchanged))
    assert run_in(folder) == 1
    message = run_status.read_status(folder).message
    assert "The dataset changed" in message and "01.png" in message


def test_P10_a_clock_that_jumps_changes_nothing(tiny_run, train_tiny, monkeypatch):
    normal = adapter_of(train_tiny())
    folder = run_folder.create(tiny_run())
    real_time, year = time.time, 365 * 86400
    calls = iter(range(10**6))
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real_time() + (-1) ** next(calls) * year)
        assert run_in(folder) == 0
    assert same(adapter_of(folder), normal)
    checkpoints = sorted(path.name for path in (folder / "state").iterdir())
    assert checkpoints == ["000004", "000006"]
    status = run_status.read_status(folder)
    for seconds in (status.finished.seconds, *status.step_seconds):
        assert 0 <= seconds < 3600


@pytest.fixture
def held_device(outputs):
    """The lock of the device, held as if by another process."""
    device = FileLock(run_lock.device_lock().lock_file, thread_local=False)
    device.acquire()
    yield device
    device.release()


def when_waiting(folder, act):
    """Starts a thread that calls `act` when the run waits for the device."""

    def watch():
        while run_status.read_status(folder).state != "waiting":
            time.sleep(0.05)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_P11_a_run_that_waits_for_the_device_can_be_stopped(tiny_run, held_device):
    folder = run_folder.create(tiny_run())
    watcher = when_waiting(folder, lambda: run_requests.request(folder, "stop"))
    assert run_in(folder) == STOPPED
    watcher.join()
    status = run_status.read_status(folder)
    assert status.state == "stopped"
    assert status.can_resume


def test_P11_a_second_run_starts_when_the_device_is_free(tiny_run, held_device):
    folder = run_folder.create(tiny_run())
    watcher = when_waiting(folder, held_device.release)
    assert run_in(folder) == 0
    watcher.join()


DYING_TRAINER = """
import os, signal, sys
from pathlib import Path
from trainer.runs import events, run_lock, run_requests
folder = Path(sys.argv[2])
lock = run_lock.acquire(folder)
run_requests.withdraw(folder, "queued")
launched = events.Launched(os.getpid(), "0", run_lock.boot_id())
events.EventLog(folder / "events.jsonl").append(launched)
print("its last words", flush=True)
{end}
"""


@pytest.mark.parametrize(
    "end, reason",
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "memory ran out"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "crashed in a library or driver"),
        ("os._exit(7)", "exit code 7"),
    ],
)
def test_P14_the_death_of_a_trainer_is_explained(outputs, tmp_path, monkeypatch, end, reason):
    (tmp_path / "dying.py").write_text(DYING_TRAINER.format(end=end))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    monkeypatch.setattr(trainer_process, "TRAINER", "dying")
    name = run_actions.start(config.RunConfig(name="short life"))
    folder = run_folder.runs_folder() / name
    launcher = queue.Launcher()
    launcher.check()
    launcher.executor.process.wait(60)
    launcher.check()
    status = run_status.read_status(folder)
    assert status.state == "interrupted" and status.can_resume
    assert reason in status.message and "press Resume" in status.message
    report = (folder / "report.txt").read_text()
    assert reason in report and "its last words" in report


def test_P14_a_restart_of_the_machine_differs_from_a_crash(outputs, monkeypatch):
    folder = run_folder.create(config.RunConfig())
    launched = events.Launched(1, "0", boot="before the restart")
    events.EventLog(folder / "events.jsonl").append(launched)
    monkeypatch.setattr(run_status, "boot_id", lambda: "after the restart")
    status = run_status.read_status(folder)
    assert "The machine was restarted" in status.message
    assert status.can_resume and "resume" in run_actions.available(status)
    monkeypatch.setattr(run_status, "boot_id", lambda: "before the restart")
    (folder / "log.txt").write_text("Fatal Python error: Segmentation fault\n\nCurrent thread")
    assert "crashed" in run_status.read_status(folder).message


def test_P15_a_busy_port_is_a_message(monkeypatch, capsys):
    busy = page.listen("127.0.0.1", 0)
    monkeypatch.setattr(page, "PORTS_TO_TRY", 1)
    assert page.main(["--no-browser", "--port", str(busy.getsockname()[1])]) == 1
    printed = capsys.readouterr().err
    assert "No port from" in printed and "--port" in printed
    assert "Traceback" not in printed
    busy.close()


def test_P17_readers_see_whole_files_at_every_moment(tmp_path):
    path = tmp_path / "a.safetensors"
    contents = [bytes([letter]) * 300_000 for letter in b"abcdefgh"]
    atomic_files.atomic_write(path, contents[0])
    ended = threading.Event()

    def write():
        for content in contents * 5:
            atomic_files.atomic_write(path, content)
        ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while not ended.is_set():
        assert path.read_bytes() in contents
        reads += 1
    writer.join()
    assert reads


def test_P17_other_users_may_read_the_files(tmp_path):
    before = os.umask(0o022)
    try:
        atomic_files.atomic_write(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


def test_P19_a_run_resumed_twice_equals_an_uninterrupted_one(tiny_run, train_tiny, monkeypatch):
    uninterrupted = train_tiny()
    folder = run_folder.create(tiny_run())
    for step in (2, 3):
        with monkeypatch.context() as patch:
            at_step(patch, step, lambda: run_requests.request(folder, "stop"))
            assert run_in(folder) == STOPPED
    assert run_in(folder) == 0
    status, expected = run_status.read_status(folder), run_status.read_status(uninterrupted)
    assert status.losses == expected.losses
    assert status.learning_rates == expected.learning_rates
    assert same(adapter_of(folder), adapter_of(uninterrupted))


def test_P19_resuming_with_other_settings_is_refused(train_tiny):
    folder = train_tiny()
    changed = config.replace(config.load(folder / "run.toml"), {"training.steps": 9})
    (folder / "run.toml").write_text(config.to_toml(changed))
    assert run_in(folder) == 1
    assert "start a new run" in run_status.read_status(folder).message.lower()


@pytest.mark.parametrize("text", HOSTILE)
def test_T01_text_reaches_the_trainer_unchanged_and_is_never_executed(outputs, monkeypatch, text):
    changes = {
        "name": text,
        "dataset.trigger": text,
        "sampling.prompts": [text],
        "base.model": text,
    }
    run = config.replace(config.RunConfig(), changes)
    folder = run_folder.runs_folder() / run_actions.start(run)
    assert folder.parent == run_folder.runs_folder()
    assert config.load(folder / "run.toml") == run

    started = []
    with monkeypatch.context() as patch:
        patch.setattr(
            subprocess, "Popen", lambda command, **options: started.append((command, options))
        )
        trainer_process.start(["resume", str(folder)], folder)
    ((command, options),) = started
    assert command == [sys.executable, "-P", "-m", "trainer", "resume", str(folder)]
    assert not options.get("shell")


def test_T08_no_code_is_imported_from_a_data_folder(outputs, tmp_path, monkeypatch):
    (tmp_path / "paths.py").write_text("import sys; print(sys.path)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(trainer_process, "TRAINER", "paths")
    folder = outputs / "runs" / "x"
    folder.mkdir(parents=True)
    (folder / "torch.py").write_text("raise SystemExit('code of a data folder was run')")
    process = trainer_process.start([], folder, stdout=subprocess.PIPE)
    paths = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 0
    assert str(folder) not in paths and "''" not in paths


def test_T12_no_file_of_a_run_contains_the_token(train_tiny, monkeypatch):
    token = "hf_" + "secretsecret1234"
    monkeypatch.setenv("HF_TOKEN", token)
    folder = train_tiny()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not any(token.encode() in path.read_bytes() for path in files)


@pytest.mark.skipif(
    not hasattr(os, "fork"), reason="killing trainers needs fork, which Windows lacks"
)
def test_a_sample_of_the_injected_faults_loses_nothing():
    """`python -m benchmarks.faults` injects many more."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.faults", "--share", "0.05"]
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    rows = re.findall(r"\| (\d+) \| (\d+) \| (\d+) \|$", ended.stdout, re.MULTILINE)
    assert len(rows) == 6
    for injected, survived, lost in rows:
        assert int(injected) > 0
        assert survived == injected
        assert lost == "0"

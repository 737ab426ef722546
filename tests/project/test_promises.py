"""The promises P1 to P19 and T1 to T12 of docs/reliability.md: that each has its tests, and those tests that have no home elsewhere."""

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
    """Does something right after a step."""
    append = events.EventLog.append

    def appending(self, event):
        append(self, event)
        if isinstance(event, events.StepDone) and event.step == step:
            act()

    monkeypatch.setattr(events.EventLog, "append", appending)


def test_every_promise_has_a_test_that_exists():
    rows = re.findall(
        r"^\| ([PT]\d+b?) \|.*?\| ([^|]+) \|$",
        (ROOT / "docs" / "reliability.md").read_text(),
        re.MULTILINE,
    )
    assert {name for name, _ in rows} == {f"P{n}" for n in range(1, 20)} | {
        f"T{n}" for n in range(1, 13)
    } | {"T4b"}
    for name, tests in rows:
        named = re.findall(r"`(test_\w+)`(?: \(`?(browser/)?(test_\w+)\.py`?\))?", tests)
        assert named, name
        sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
        assert all(f"def {test}(" in sources for test, *_ in named), (name, named)


def test_P02_all_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Whatever a power cut drops that was not synced: under a final name there is only what was."""
    synced, happened = set(), []
    fsync, replace = os.fsync, os.replace

    def syncing(descriptor):
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def replacing(source, target):
        inside = [str(path) for path in Path(source).rglob("*")] if Path(source).is_dir() else []
        happened.append((str(target), {str(source), *inside} <= synced))
        synced.discard(str(Path(target).parent))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    atomic_files.atomic_write(tmp_path / "a", b"x")
    assert str(tmp_path) in synced
    with atomic_files.atomic_folder(tmp_path / "b") as temporary:
        (temporary / "c").write_bytes(b"x")
        (temporary / "d").write_bytes(b"x")
    assert str(tmp_path) in synced
    assert happened == [(str(tmp_path / "a"), True), (str(tmp_path / "b"), True)]


def test_P04_a_signal_saves_the_present_step_and_resuming_goes_on(
    tiny_run, train_tiny, monkeypatch
):
    whole = adapter_of(train_tiny({"saving.state_every": 100}))
    folder = run_folder.create(tiny_run({"saving.state_every": 100}))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run_in(folder) == STOPPED
    assert run_status.read_status(folder).state == "stopped" and (folder / "state" / "000004").is_dir()
    assert run_in(folder) == 0 and same(adapter_of(folder), whole)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_P06_a_folder_that_cannot_be_written_is_refused_before_the_base_is_read(
    tiny_run, monkeypatch
):
    folder = run_folder.create(tiny_run())
    (folder / ".lock").mkdir()  # as on a read-only disk: the lock cannot be made
    monkeypatch.setattr("trainer.training.runner._train", lambda *a: pytest.fail("it went on"))
    from trainer.cli.main import main

    assert main(["resume", str(folder)]) == 1


def test_P09_pictures_that_go_or_change_meanwhile_alter_nothing_and_are_named_at_resume(
    tiny_run, tiny_dataset, tmp_path, monkeypatch
):
    whole = run_folder.create(tiny_run())
    assert run_in(whole) == 0
    dataset = shutil.copytree(tiny_dataset, tmp_path / "copy")
    folder = run_folder.create(tiny_run({"dataset.folder": str(dataset)}))

    def change():
        (dataset / "01.png").unlink()
        (dataset / "02.txt").write_text("something else")

    with monkeypatch.context() as patch:
        at_step(patch, 2, change)
        assert run_in(folder) == 0
    assert same(adapter_of(folder), adapter_of(whole))
    assert run_in(folder) == 1
    assert (
        "The dataset changed" in run_status.read_status(folder).message
        and "01.png" in run_status.read_status(folder).message
    )


def test_P10_a_clock_that_jumps_changes_and_loses_nothing(tiny_run, train_tiny, monkeypatch):
    whole = adapter_of(train_tiny())
    real, year, calls = time.time, 365 * 86400, iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: real() + (-1) ** next(calls) * year)
    folder = run_folder.create(tiny_run())
    assert run_in(folder) == 0
    status = run_status.read_status(folder)
    assert same(adapter_of(folder), whole) and sorted(
        path.name for path in (folder / "state").iterdir()
    ) == ["000004", "000006"]
    assert 0 <= status.finished.seconds < 3600 and all(
        0 <= seconds < 3600 for seconds in status.step_seconds
    )
    monkeypatch.undo()


def test_P11_a_second_run_waits_for_the_device_and_can_be_stopped_meanwhile(tiny_run):
    folder = run_folder.create(tiny_run())
    device = FileLock(
        run_lock.device_lock().lock_file, thread_local=False
    )  # as held by another process
    device.acquire()
    states = []

    def watch(then):
        while run_status.read_status(folder).state != "waiting":
            time.sleep(0.05)
        states.append("waiting")
        then()

    watching = threading.Thread(target=watch, args=(lambda: run_requests.request(folder, "stop"),))
    watching.start()
    assert run_in(folder) == STOPPED
    watching.join()
    assert run_status.read_status(folder).state == "stopped" and run_status.read_status(folder).can_resume
    watching = threading.Thread(target=watch, args=(device.release,))
    watching.start()
    assert run_in(folder) == 0
    watching.join()
    assert states == ["waiting"] * 2


DYING = """
import os, signal, sys
from pathlib import Path
from trainer.runs import events, run_lock, run_requests
folder = Path(sys.argv[2])
lock = run_lock.acquire(folder)
run_requests.withdraw(folder, "queued")
events.EventLog(folder / "events.jsonl").append(events.Launched(os.getpid(), "0", run_lock.boot_id()))
print("its last words", flush=True)
{how}
"""


@pytest.mark.parametrize(
    "how, said",
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "memory ran out"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "crashed in a library or driver"),
        ("os._exit(7)", "exit code 7"),
    ],
)
def test_P14_a_trainer_that_dies_is_explained(outputs, tmp_path, monkeypatch, how, said):
    (tmp_path / "dying.py").write_text(DYING.format(how=how))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    monkeypatch.setattr(trainer_process, "TRAINER", "dying")
    folder = run_folder.runs_folder() / run_actions.start(config.RunConfig(name="short life"))
    launcher = queue.Launcher()
    launcher.check()
    launcher.executor.process.wait(60)
    launcher.check()
    status = run_status.read_status(folder)
    assert (
        status.state == "interrupted"
        and said in status.message
        and "press Resume" in status.message
        and status.can_resume
    )
    report = (folder / "report.txt").read_text()
    assert said in report and "its last words" in report


def test_P14_a_restart_of_the_machine_is_told_from_a_crash(outputs, monkeypatch):
    folder = run_folder.create(config.RunConfig())
    events.EventLog(folder / "events.jsonl").append(events.Launched(1, "0", "an earlier start"))
    monkeypatch.setattr(run_lock, "boot_id", lambda: "this start")
    status = run_status.read_status(folder)
    assert (
        "The machine was restarted" in status.message
        and status.can_resume
        and "resume" in run_actions.available(status)
    )
    monkeypatch.setattr(run_lock, "boot_id", lambda: "")
    (folder / "log.txt").write_text("Fatal Python error: Segmentation fault\n\nCurrent thread")
    assert "crashed" in run_status.read_status(folder).message


def test_P15_a_busy_port_is_a_sentence(monkeypatch, capsys):
    taken = page.listen("127.0.0.1", 0)
    monkeypatch.setattr(page, "PORTS_TO_TRY", 1)
    assert page.main(["--no-browser", "--port", str(taken.getsockname()[1])]) == 1
    shown = capsys.readouterr().err
    assert "No port from" in shown and "--port" in shown and "Traceback" not in shown
    taken.close()


def test_P17_a_file_is_whole_at_every_moment_and_others_may_read_it(tmp_path):
    path, contents = (
        tmp_path / "a.safetensors",
        [bytes([letter]) * 300_000 for letter in b"abcdefgh"],
    )
    atomic_files.atomic_write(path, contents[0])
    ended = threading.Event()

    def write():
        for content in contents * 5:
            atomic_files.atomic_write(path, content)
        ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = 0
    while not ended.is_set():
        assert path.read_bytes() in contents
        seen += 1
    writer.join()
    assert seen and stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def test_P19_resumed_twice_all_counts_on_and_other_settings_are_refused(
    tiny_run, train_tiny, monkeypatch
):
    whole = train_tiny()
    folder = run_folder.create(tiny_run())
    for step in (2, 3):
        with monkeypatch.context() as patch:
            at_step(patch, step, lambda: run_requests.request(folder, "stop"))
            assert run_in(folder) == STOPPED
    assert run_in(folder) == 0
    ours, theirs = run_status.read_status(folder), run_status.read_status(whole)
    assert (
        ours.losses == theirs.losses
        and ours.learning_rates == theirs.learning_rates
        and same(adapter_of(folder), adapter_of(whole))
    )
    changed = config.replace(config.load(folder / "run.toml"), {"training.steps": 9})
    (folder / "run.toml").write_text(config.to_toml(changed))
    assert run_in(folder) == 1 and "start a new run" in run_status.read_status(folder).message.lower()


@pytest.mark.parametrize("text", HOSTILE)
def test_T01_what_is_typed_reaches_the_trainer_as_it_is_and_is_never_run(outputs, text):
    run = config.replace(
        config.RunConfig(),
        {"name": text, "dataset.trigger": text, "sampling.prompts": [text], "base.model": text},
    )
    folder = run_folder.runs_folder() / run_actions.start(run)
    assert folder.parent == run_folder.runs_folder() and config.load(folder / "run.toml") == run
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            subprocess, "Popen", lambda command, **options: asked.append((command, options))
        )
        trainer_process.start(["resume", str(folder)], folder)
    command, options = asked[0]
    assert command == [
        sys.executable,
        "-P",
        "-m",
        "trainer",
        "resume",
        str(folder),
    ] and not options.get("shell")


def test_T08_no_data_folder_is_a_place_that_code_comes_from(outputs, tmp_path, monkeypatch):
    (tmp_path / "paths.py").write_text("import sys; print(sys.path)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(trainer_process, "TRAINER", "paths")
    folder = outputs / "runs" / "x"
    folder.mkdir(parents=True)
    (folder / "torch.py").write_text("raise SystemExit('code of a data folder was run')")
    process = trainer_process.start([], folder, stdout=subprocess.PIPE)
    paths = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 0 and str(folder) not in paths and "''" not in paths


def test_T12_a_token_is_in_no_file_of_a_run(train_tiny, monkeypatch):
    token = "hf_" + "secretsecret1234"
    monkeypatch.setenv("HF_TOKEN", token)
    folder = train_tiny()
    assert not any(
        token.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file()
    )


@pytest.mark.skipif(
    not hasattr(os, "fork"), reason="killing trainers needs fork, which Windows lacks"
)
def test_a_bounded_share_of_the_faults_loses_nothing():
    """`python -m benchmarks.faults` injects many more."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.faults", "--share", "0.05"]
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    rows = re.findall(r"\| (\d+) \| (\d+) \| (\d+) \|$", ended.stdout, re.MULTILINE)
    assert len(rows) == 6 and all(
        injected == survived and lost == "0" and int(injected) for injected, survived, lost in rows
    )

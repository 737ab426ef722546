"""The commands: exit codes, messages, and a short job from training to checking."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from trainer import config
from trainer.cli.main import build_parser, main
from trainer.runs import run_folder, run_status

ROOT = Path(__file__).parents[2]
COMMANDS = [
    "train",
    "sweep",
    "class-pictures",
    "resume",
    "sample",
    "check",
    "caption",
    "info",
    "cache",
    "convert",
    "compose",
    "resize",
    "extract",
    "merge",
    "demo",
]


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_the_help_of_train_lists_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    missing = [path for path, _ in config.fields() if f"  {path}\n" not in text]
    assert missing == []


def test_every_command_is_listed_and_no_other(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["fly"])
    listed = capsys.readouterr().err
    assert all(f"'{name}'" in listed for name in COMMANDS)
    assert listed.count("', '") == len(COMMANDS) - 1


def test_help_needs_no_torch():
    code = (
        "import sys\n"
        "from trainer.cli.main import build_parser\n"
        "build_parser().format_help()\n"
        "print([name for name in ('torch', 'diffusers', 'numpy', 'PIL') if name in sys.modules])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert ended.stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [[], ["fly"], ["resume"], ["sample", "--seed", "x"]])
def test_wrong_usage_has_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "no-such-preset", "--dataset", "."], "no preset named"),
        (["train", "embedded-subject"], "No dataset: pass --dataset"),
        (["train", "embedded-subject", "--set", "training.steps"], "key=value"),
        (
            ["train", "embedded-subject", "--set", "training.speed=3"],
            "no setting named training.speed",
        ),
        (["train", "missing.toml"], "missing.toml"),
        (["resume", "nowhere"], "not a run folder"),
        (["info", "nowhere.safetensors"], "no adapter file nowhere"),
        (["check", "nowhere"], "nowhere"),
        (["train", "embedded-subject", "--dataset", "nowhere"], "nowhere"),
        (["class-pictures", "embedded-subject"], "No class images to generate"),
        (["caption", "nowhere"], "nowhere is not a folder"),
        (["sample", "--adapter", "nowhere.safetensors"], "nowhere.safetensors"),
        (["sample", "--base", "/nowhere/model"], "no base model"),
        (["sample", "--size", "axb"], "WxH"),
        (["sample", "--adapter", "a.safetensors:strong"], "FILE:STRENGTH"),
        (["resize", "a.safetensors", "--rank", "-1", "--output", "b"], "a.safetensors"),
        (["sweep", "embedded-subject", "--dataset", "."], "No settings to combine"),
    ],
)
def test_an_error_is_a_message_with_exit_code_1(
    arguments, message, outputs, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err + printed.out


def test_train_sample_info_and_check(tiny_run, tiny_base, tiny_dataset, tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text(config.to_toml(tiny_run({"dataset.folder": ""})))
    options = ["--dataset", tiny_dataset, "--name", "żółć; touch x"]
    changes = ["--set", "training.steps=2", "--set", "dataset.trigger=zorbit"]
    assert run("train", file, *options, *changes) == 0
    (folder,) = run_folder.list_runs()
    trained = config.load(folder / "run.toml")
    assert trained.name == "żółć; touch x"
    assert trained.training.steps == 2
    assert trained.dataset.trigger == "zorbit"

    adapter = folder / run_status.read_status(folder).finished.file
    images = set()
    for strength in ("0", "1", "1.7"):
        output = tmp_path / f"{strength}.png"
        base = ["--base", tiny_base, "--prompt", "zorbit", "--steps", 2]
        weighted = ["--adapter", f"{adapter}:{strength}"]
        assert run("sample", *base, *weighted, "--output", output) == 0
        images.add(output.read_bytes())
    assert len(images) == 3

    capsys.readouterr()
    assert run("info", adapter, "--json") == 0
    assert json.loads(capsys.readouterr().out)["trigger"] == "zorbit"
    assert run("check", tiny_dataset, "--json") == 0
    assert json.loads(capsys.readouterr().out)["pictures"] == 4


def test_processes_of_torchrun_train_one_run_together(tiny_run, tmp_path):
    """Only rank 0 creates a run folder; the others receive its path."""
    file = tmp_path / "run.toml"
    changes = {"name": "żółć", "training.steps": 2, "saving.saves": 1}
    file.write_text(config.to_toml(tiny_run(changes)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = [sys.executable, "-m", "trainer", "train", str(file)]
        processes.append(
            subprocess.Popen(
                command,
                env=environment,
                cwd=ROOT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    (folder,) = run_folder.list_runs()
    assert run_status.read_status(folder).state == "finished"


def test_info_prints_labels_for_people_and_keeps_the_json_keys(train_tiny, capsys):
    adapter = train_tiny({"training.steps": 1, "saving.saves": 1}) / "tiny.safetensors"
    capsys.readouterr()
    assert run("info", adapter) == 0
    text = capsys.readouterr().out
    assert "format:" in text and "images:" in text
    assert run("info", adapter, "--json") == 0
    keys = json.loads(capsys.readouterr().out).keys()
    assert {"dialect", "pictures"} <= keys


def test_sigterm_saves_and_ends_with_exit_code_3(tiny_run):
    """Runs the real process, started as the page starts it."""
    folder = run_folder.create(tiny_run({"training.steps": 100_000, "saving.state_every": 50}))
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", "resume", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        while run_status.read_status(folder).step < 3:
            assert process.poll() is None, process.stdout.read()
        process.terminate()
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 3
    assert run_status.read_status(folder).state == "stopped"
    assert (folder / "tiny.safetensors").is_file()
    assert "xFormers" not in output and "torchvision" not in output, "a warning of a library"

"""The commands: exit codes, sentences, and a whole short job."""

import json
import os
import subprocess
import sys

import pytest

from trainer import config
from trainer.cli.main import main
from trainer.runs import run_folder, run_status


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    "command", [[], ["train"], ["resume"], ["sample"], ["check"], ["info"], ["demo"]]
)
def test_help_everywhere(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "usage" in text
    if command == ["train"]:
        assert all(path in text for path, _ in config.fields())


@pytest.mark.parametrize("arguments", [[], ["fly"], ["resume"], ["sample", "--seed", "x"]])
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and "usage" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train", "no-such-preset", "--dataset", "."], "no preset named"),
        (["train", "embedded-subject"], "Which pictures?"),
        (["train", "embedded-subject", "--set", "training.steps"], "key=value"),
        (
            ["train", "embedded-subject", "--set", "training.speed=3"],
            "no setting named training.speed",
        ),
        (["train", "missing.toml"], "missing.toml"),
        (["resume", "nowhere"], "no run folder"),
        (["info", "nowhere.safetensors"], "no adapter file nowhere"),
        (["check", "nowhere"], "nowhere"),
        (["train", "embedded-subject", "--dataset", "nowhere"], "nowhere"),
        (["sample", "--adapter", "nowhere.safetensors"], "nowhere.safetensors"),
        (["sample", "--base", "/nowhere/model"], "no base model"),
        (["sample", "--size", "axb"], "WxH"),
        (["sample", "--adapter", "a.safetensors:strong"], "FILE:STRENGTH"),
    ],
)
def test_what_cannot_work_is_a_sentence_and_exit_code_1(
    arguments, words, outputs, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 1
    told = capsys.readouterr()
    assert words in told.err and "Traceback" not in told.err + told.out


def test_train_sample_info_and_check(tiny_run, tiny_base, tiny_dataset, tmp_path, capsys):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(config.to_toml(tiny_run({"dataset.folder": ""})))
    assert (
        run(
            "train",
            recipe,
            "--dataset",
            tiny_dataset,
            "--name",
            "żółć; touch x",
            "--set",
            "training.steps=2",
            "--set",
            "dataset.trigger=zorbit",
        )
        == 0
    )
    (folder,) = run_folder.list_runs()
    trained = config.load(folder / "run.toml")
    assert (trained.name, trained.training.steps, trained.dataset.trigger) == (
        "żółć; touch x",
        2,
        "zorbit",
    )
    adapter = folder / run_status.read_status(folder).finished.file
    pictures = {}
    for strength in ("0", "1", "1.7"):
        assert (
            run(
                "sample",
                "--base",
                tiny_base,
                "--prompt",
                "zorbit",
                "--steps",
                2,
                "--adapter",
                f"{adapter}:{strength}",
                "--output",
                tmp_path / f"{strength}.png",
            )
            == 0
        )
        pictures[strength] = (tmp_path / f"{strength}.png").read_bytes()
    assert len(set(pictures.values())) == 3
    capsys.readouterr()
    assert run("info", adapter, "--json") == 0
    assert json.loads(capsys.readouterr().out)["trigger"] == "zorbit"
    assert run("check", tiny_dataset, "--json") == 0
    assert json.loads(capsys.readouterr().out)["pictures"] == 4


def test_the_module_starts_and_a_term_signal_saves(tiny_run):
    """The real process: started as the page does, asked to end as the system does."""
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
    status = run_status.read_status(folder)
    assert (
        process.returncode == 3
        and status.state == "stopped"
        and (folder / "tiny.safetensors").is_file()
    )
    assert "xFormers" not in output and "torchvision" not in output

"""A sweep: a list of ordinary runs, and a comparison of their results."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from app.actions import library
from trainer import config
from trainer.cli.main import main
from trainer.cli.sweep import results, sweep_command, sweep_folder
from trainer.errors import ConfigError, StateError
from trainer.runs import run_folder, run_requests
from trainer.training.runner import STOPPED

GRID = ["--grid", "adapter.rank=2,4", "--grid", "training.learning_rate=1e-2,1e-3"]


@pytest.fixture
def settings_file(tiny_run, tmp_path):
    file = tmp_path / "run.toml"
    shorter = {"training.steps": 4, "saving.saves": 2, "sampling.inference_steps": 1}
    file.write_text(config.to_toml(tiny_run(shorter)), encoding="utf-8")
    return str(file)


def the_sweep(outputs):
    (folder,) = (outputs / "sweeps").iterdir()
    return folder


def test_every_combination_is_trained_and_compared(settings_file, outputs, capsys):
    assert main(["sweep", settings_file, "--name", "trial", *GRID]) == 0
    folder = the_sweep(outputs)
    rows = results.read_rows(folder)
    assert len(run_folder.list_runs()) == len(rows) == 4
    assert {row.state for row in rows} == {"finished"}
    combinations = {tuple(row.settings.values()) for row in rows}
    assert combinations == {(2, 1e-2), (2, 1e-3), (4, 1e-2), (4, 1e-3)}
    for row in rows:
        trained = config.load(outputs / "runs" / row.run / "run.toml")
        assert trained.adapter.rank == row.settings["adapter.rank"]
        assert trained.name.startswith("trial rank=")
        assert row.seconds > 0

    losses = [row.validation_loss for row in rows]
    assert losses == sorted(losses) and len(set(losses)) == 4
    table = (folder / "results.md").read_text(encoding="utf-8")
    assert table.split("## ")[0].count("\n| ") == 5, "a header and four runs"
    assert all(f"{loss:.4f}" in table for loss in losses)
    assert rows[0].run in capsys.readouterr().out
    plot = ElementTree.parse(folder / "results.svg")
    assert len(plot.findall("{http://www.w3.org/2000/svg}polyline")) == 4

    same_rank = [row.run for row in rows if row.settings["adapter.rank"] == 2]
    compared = library.compare(*same_rank)
    assert [each["path"] for each in compared["settings"]] == ["training.learning_rate"]

    logs = [outputs / "runs" / row.run / "events.jsonl" for row in rows]
    before = [log.read_bytes() for log in logs]
    assert main(["sweep", str(folder)]) == 0
    assert before == [log.read_bytes() for log in logs], "a finished run is not trained again"


def test_queued_runs_of_a_sweep_keep_its_order(settings_file, outputs):
    assert main(["sweep", settings_file, "--queue", *GRID]) == 0
    names = json.loads((the_sweep(outputs) / "sweep.json").read_text())["runs"]
    assert len(names) == 4
    assert [folder.name for folder in run_requests.queue()] == names
    rows = results.read_rows(the_sweep(outputs))
    assert {row.validation_loss for row in rows} == {None}


def test_results_can_be_written_before_the_first_run(tiny_run, outputs):
    folder = sweep_folder.create(tiny_run(), [("adapter.rank", [2, 4])])
    assert results.write_results(folder).count("| new |") == 2
    ElementTree.parse(folder / "results.svg")


@pytest.mark.parametrize("failure", [1, -9])
def test_a_sweep_continues_after_a_failed_run(tiny_run, outputs, failure):
    folder = sweep_folder.create(tiny_run(), [("adapter.rank", [2, 4, 8])])
    codes = iter([failure, 0, 0])
    trained = []

    def run_in(run):
        trained.append(run)
        return next(codes)

    assert sweep_command.train(folder, run_in, STOPPED) == failure
    assert trained == sweep_folder.read(folder)[1]


def test_a_stopped_run_ends_its_sweep(tiny_run, outputs):
    folder = sweep_folder.create(tiny_run(), [("adapter.rank", [2, 4, 8])])
    codes = iter([0, STOPPED, 0])
    trained = []

    def run_in(run):
        trained.append(run)
        return next(codes)

    assert sweep_command.train(folder, run_in, STOPPED) == STOPPED
    assert trained == sweep_folder.read(folder)[1][:2]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("adapter.rank=8,16,8", ("adapter.rank", [8, 16])),
        ("adapter.kind=lora, dora", ("adapter.kind", ["lora", "dora"])),
        ("training.learning_rate = 1e-4,5e-4", ("training.learning_rate", [1e-4, 5e-4])),
        ("dataset.flip=true,false", ("dataset.flip", [True, False])),
        ('dataset.trigger="a,b",c', ("dataset.trigger", ['"a', 'b"', "c"])),
    ],
)
def test_the_values_of_a_grid_are_toml_or_plain_words(text, expected):
    assert sweep_folder.parse_grid(text) == expected


@pytest.mark.parametrize(
    "grid, message",
    [
        (["adapter.rank"], "key=value,value"),
        (["adapter.rank=8,0"], "With adapter.rank = 0"),
        (["adapter.rang=8"], "no setting named adapter.rang"),
        (["adapter.rank=8", "adapter.rank=16"], "adapter.rank twice"),
        (
            [
                f"training.seed={','.join(map(str, range(30)))}",
                f"adapter.rank={','.join(map(str, range(1, 20)))}",
            ],
            "more than 500",
        ),
    ],
)
def test_an_invalid_grid_is_refused_before_any_run_is_created(grid, message, tiny_run, outputs):
    with pytest.raises(ConfigError, match=message):
        sweep_folder.create(tiny_run(), [sweep_folder.parse_grid(text) for text in grid])
    assert run_folder.list_runs() == []


def test_a_name_that_would_be_too_long_gets_a_number(tiny_run):
    run = config.replace(tiny_run(), {"name": "x" * 80})
    runs = sweep_folder.combinations(run, [("adapter.rank", [2, 4])])
    assert [each.name for each in runs] == [f"{'x' * 75} 001", f"{'x' * 75} 002"]


def test_a_folder_without_a_readable_sweep_json_is_not_a_sweep(tmp_path):
    with pytest.raises(StateError, match="is not a sweep"):
        sweep_folder.read(tmp_path)


def test_a_sweep_cannot_lead_out_of_the_runs_folder(tiny_run, outputs):
    folder = sweep_folder.create(tiny_run(), [("adapter.rank", [2])])
    content = json.loads((folder / "sweep.json").read_text())
    (outputs / "elsewhere").mkdir()
    (outputs / "elsewhere" / "run.toml").write_text("")
    content["runs"] = ["../elsewhere"]
    (folder / "sweep.json").write_text(json.dumps(content))
    assert sweep_folder.read(folder)[1] == []

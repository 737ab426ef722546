"""A sweep is a list of ordinary runs, and what came out of them."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from app.actions import library
from trainer import config
from trainer.cli import sweep, sweep_folder, sweep_results
from trainer.cli.main import main
from trainer.errors import ConfigError
from trainer.runs import run_folder, run_requests
from trainer.training.runner import STOPPED

GRID = ["--grid", "adapter.rank=2,4", "--grid", "training.learning_rate=1e-2,1e-3"]


@pytest.fixture
def recipe(tiny_run, tmp_path):
    file = tmp_path / "recipe.toml"
    shorter = {"training.steps": 4, "saving.saves": 2, "sampling.inference_steps": 1}
    file.write_text(config.to_toml(tiny_run(shorter)), encoding="utf-8")
    return str(file)


def the_sweep(outputs):
    return next((outputs / "sweeps").iterdir())


def test_every_combination_is_trained_and_told_apart(recipe, outputs, capsys):
    assert main(["sweep", recipe, "--name", "trial", *GRID]) == 0
    folder, runs = the_sweep(outputs), run_folder.list_runs()
    found = sweep_results.rows(folder)
    assert len(runs) == len(found) == 4 and {row["state"] for row in found} == {"finished"}
    assert {tuple(row["settings"].values()) for row in found} == {
        (2, 1e-2),
        (2, 1e-3),
        (4, 1e-2),
        (4, 1e-3),
    }
    assert all(
        config.load(outputs / "runs" / row["run"] / "run.toml").adapter.rank
        == row["settings"]["adapter.rank"]
        for row in found
    )
    assert config.load(outputs / "runs" / found[0]["run"] / "run.toml").name.startswith(
        "trial rank="
    )
    losses = [row["validation_loss"] for row in found]
    assert (
        losses == sorted(losses)
        and len(set(losses)) == 4
        and all(row["seconds"] > 0 for row in found)
    )
    table = (folder / "results.md").read_text(encoding="utf-8")
    assert (
        table.split("## ")[0].count("\n| ") == 5
        and all(f"{loss:.4f}" in table for loss in losses)
        and found[0]["run"] in capsys.readouterr().out
    )
    drawing = ElementTree.parse(folder / "results.svg")
    assert len(drawing.findall("{http://www.w3.org/2000/svg}polyline")) == 4
    compared = library.compare(
        *(row["run"] for row in found if row["settings"]["adapter.rank"] == 2)
    )
    assert [each["path"] for each in compared["settings"]] == ["training.learning_rate"]
    events = [(outputs / "runs" / row["run"] / "events.jsonl").read_bytes() for row in found]
    assert main(["sweep", str(folder)]) == 0  # nothing is left to train
    assert events == [
        (outputs / "runs" / row["run"] / "events.jsonl").read_bytes() for row in found
    ]


def test_a_sweep_for_the_page_waits_in_its_order(recipe, outputs):
    assert main(["sweep", recipe, "--queue", *GRID]) == 0
    queue = run_requests.queue()
    assert [folder.name for folder in queue] == json.loads(
        (the_sweep(outputs) / "sweep.json").read_text()
    )["runs"] and len(queue) == 4
    assert {row["validation_loss"] for row in sweep_results.rows(the_sweep(outputs))} == {None}
    sweep_results.write_results(the_sweep(outputs))


@pytest.mark.parametrize("failure", [1, -9])
def test_a_failure_does_not_end_a_sweep_and_a_stop_does(tiny_run, outputs, failure):
    """Also that of a launcher of several processes which was killed."""
    folder = sweep_folder.create(tiny_run(), [sweep_folder.parse_grid("adapter.rank=2,4,8")])
    answers, asked = [failure, 0, 0], []
    assert (
        sweep.train(folder, lambda run: asked.append(run) or answers[len(asked) - 1], STOPPED)
        == failure
        and len(asked) == 3
    )
    answers, asked = [0, STOPPED, 0], []
    assert (
        sweep.train(folder, lambda run: asked.append(run) or answers[len(asked) - 1], STOPPED)
        == STOPPED
        and len(asked) == 2
    )


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
def test_grids_from_the_command_line(text, expected):
    assert sweep_folder.parse_grid(text) == expected


@pytest.mark.parametrize(
    "grid, words",
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
def test_what_cannot_be_is_said_before_anything_is_made(grid, words, tiny_run, outputs):
    with pytest.raises(ConfigError, match=words):
        sweep_folder.create(tiny_run(), [sweep_folder.parse_grid(text) for text in grid])
    assert run_folder.list_runs() == []

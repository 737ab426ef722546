"""Options and reports of the commands for adapters."""

import argparse
import json

import pytest

from trainer.cli import adapter_options
from trainer.cli.adapter_options import Report, parse_adapter
from trainer.errors import ConfigError


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a.safetensors", {"file": "a.safetensors"}),
        ("a.safetensors:0.8", {"file": "a.safetensors", "strength": 0.8}),
        (
            "a.safetensors:0.8:-0.5",
            {"file": "a.safetensors", "strength": 0.8, "text_strength": -0.5},
        ),
        ("C:\\loras\\a.safetensors", {"file": "C:\\loras\\a.safetensors"}),
        ("C:\\loras\\a.safetensors:1", {"file": "C:\\loras\\a.safetensors", "strength": 1.0}),
        ("peft-folder:2", {"file": "peft-folder", "strength": 2.0}),
    ],
)
def test_the_strengths_follow_the_file(text, expected):
    assert parse_adapter(text) == expected


def test_a_colon_in_the_path_of_a_folder_belongs_to_the_path(tmp_path):
    folder = tmp_path / "style:2"
    folder.mkdir()
    assert parse_adapter(str(folder)) == {"file": str(folder)}
    assert parse_adapter(f"{folder}:0.5") == {"file": str(folder), "strength": 0.5}


def test_a_strength_that_is_not_a_number_is_an_error():
    with pytest.raises(ConfigError, match="FILE:STRENGTH"):
        parse_adapter("a.safetensors:strong")


@pytest.mark.parametrize(
    "rank, energy, is_valid",
    [
        (0, 1.0, True),
        (8, 0.95, True),
        (-1, 1.0, False),
        (8, 0.0, False),
        (8, 1.01, False),
    ],
)
def test_the_rank_and_the_energy_have_bounds(rank, energy, is_valid):
    options = argparse.Namespace(rank=rank, energy=energy)
    if is_valid:
        assert adapter_options.parse_size(options) == (rank, energy)
        return
    with pytest.raises(ConfigError, match=f"got {rank} and {energy:g}"):
        adapter_options.parse_size(options)


def test_nothing_is_overwritten(tmp_path):
    adapter_options.check_free(tmp_path / "new.safetensors")
    with pytest.raises(ConfigError, match="already exists"):
        adapter_options.check_free(tmp_path)


def test_progress_is_printed_at_most_twice_a_second(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(adapter_options.time, "monotonic", lambda: now[0])
    report = Report(as_json=True)
    for tenth in range(1, 12):
        now[0] = tenth / 10
        report.progress(tenth, 11)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"progress": [5, 11]}, {"progress": [10, 11]}]


def test_a_report_for_people_prints_progress_on_standard_error(monkeypatch, capsys):
    monkeypatch.setattr(adapter_options, "PROGRESS_INTERVAL", 0)
    report = Report(as_json=False)
    report.progress(1, 2)
    report.result({"kept_energy": "99%", "by_module": [1, 2]})
    printed = capsys.readouterr()
    assert printed.err == "1 of 2\n"
    assert printed.out == "kept energy:          99%\n"

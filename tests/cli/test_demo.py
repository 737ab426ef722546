"""The demo as `make demo` runs it: the adapter shows its subject only with the trigger word."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from trainer.runs import run_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    outputs = tmp_path_factory.mktemp("demo") / "outputs"
    environment = os.environ | {"ATELIER_OUTPUTS": str(outputs)}
    ended = subprocess.run(
        [sys.executable, "-m", "trainer", "demo"], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    (folder,) = run_folder.list_runs(outputs / "runs")
    return folder


@pytest.fixture(scope="module")
def report(folder):
    return json.loads((folder / "report.json").read_text())


def test_strength_0_equals_the_base_bit_for_bit(report):
    assert report["strength_0_is_base"] is True


def test_the_subject_appears_at_strength_1_and_not_at_0(report):
    assert report["with_trigger"]["1"] >= 0.7
    assert report["with_trigger"]["0"] <= 0.1


def test_prompts_without_the_trigger_word_do_not_change(report):
    assert report["without_trigger"]["1"] <= 0.1
    assert report["other_prompts_right"]["1"] >= report["other_prompts_right"]["0"] - 0.15


def test_the_run_folder_contains_the_adapter_a_grid_and_a_report(folder, report):
    assert (folder / report["adapter"]).stat().st_size > 100_000
    assert Image.open(folder / "before-after.png").size[0] > 700
    text = (folder / "report.md").read_text()
    assert f"{report['steps']} steps" in text
    assert "before-after.png" in text

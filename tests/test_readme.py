"""The README's commands and claims, executed."""

import re
import shlex
import shutil
from datetime import date
from pathlib import Path

import pytest

from trainer import base_model
from trainer.__main__ import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = base_model.EMBEDDED_FOLDER.parent / "examples" / "subject"


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("python -m trainer")]


def test_every_trainer_command_of_the_readme_works(tmp_path, monkeypatch):
    """In order, as a reader would, in three steps instead of three hundred, on today's date."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATELIER_OUTPUTS", str(tmp_path / "outputs"))
    shutil.copytree(EXAMPLE, tmp_path / "my-pictures")
    assert len(commands()) == 5
    for command in commands():
        shortened = command.replace("steps=300", "steps=3").replace("2026-11-22", date.today().isoformat())
        assert main(shlex.split(shortened)[3:]) == 0, command
    assert (tmp_path / "sample.png").is_file()


def test_the_diffusers_block_of_the_readme_works(tmp_path, train_tiny, tiny_base):
    block = re.search(r"```py\n(.*?)```", README, re.DOTALL).group(1)
    folder = train_tiny()
    code = block.replace("stable-diffusion-v1-5/stable-diffusion-v1-5", str(tiny_base)).replace(
        "outputs/runs/2026-11-22-maya/maya.safetensors", str(folder / "tiny.safetensors")
    )
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["pipe"].get_active_adapters() == ["maya"]


@pytest.mark.parametrize("path", re.findall(r"\]\(([a-zA-Z][^):]*)\)", README))
def test_every_link_of_the_readme_leads_somewhere(path):
    assert (ROOT / path).exists()


def test_make_knows_what_the_readme_names():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{target}:" in makefile for target in re.findall(r"make (app|demo|test)\b", README))

"""Runs the commands and code of README and docs, or at least parses them."""

import re
import shlex
import shutil
import tomllib
from datetime import date
from pathlib import Path

import pytest

from app import __main__ as server
from trainer import config
from trainer.cli.main import build_parser, main
from trainer.cli.run_options import read_settings
from trainer.cli.sweep import sweep_folder
from trainer.models import model_files

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLE = model_files.EMBEDDED_FOLDER.parent / "examples" / "subject"

# Replacements that make the written commands short enough for a test.
SHORTER = {
    "--set training.steps=300": (
        "--set training.steps=2 --set saving.saves=1 --set sampling.inference_steps=2"
    ),
    '"training.steps": 300': (
        '"training.steps": 2, "saving.saves": 1, "sampling.inference_steps": 2'
    ),
    "outputs/runs/2026-11-22-": f"outputs/runs/{date.today().isoformat()}-",
}
# Beginnings of commands that are only parsed, with the reason.
ONLY_READ = {
    "make ": "installs the program; `make test` runs these tests",
    "python -m trainer train sdxl": "needs a GPU and a download",
    "python -m trainer sweep sd15": "needs a download; tests/cli/test_sweep.py runs one",
    "python -m app --ray": "needs a Ray cluster; see tests/app/test_ray_jobs.py",
    "torchrun ": "needs GPUs; tests/training/test_distributed.py runs two processes",
    "accelerate launch ": "needs GPUs; tests/training/test_distributed.py runs two processes",
}
# Commands that sentences name without their required arguments.
WITHOUT_ARGUMENTS = ("check", "caption", "class-pictures", "convert", "sweep", "train")
# Pages whose Python code runs in other tests.
ELSEWHERE = {
    ("README.md", "py"): "test_the_python_code_of_the_readme_works",
    ("api.md", "python"): "tests/browser/test_api.py",
}
DRAWN = ("text", "bat")  # diagrams made of letters, and commands of Windows


def blocks(page: Path) -> list[tuple[str, str]]:
    """Returns the language and content of each fenced block."""
    found = re.findall(
        r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert all(language for language, _ in found), f"{page.name} has a block without a language"
    return found


def lines(page: Path) -> list[str]:
    """Returns the commands of a page, without comments."""
    contents = [content for language, content in blocks(page) if language == "sh"]
    return [
        line for content in contents for line in re.sub(r"\s+#.*", "", content).splitlines() if line
    ]


def shorter(code: str) -> str:
    for written, run in SHORTER.items():
        code = code.replace(written, run)
    return code


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """Creates the working directory of a reader, with the images that the pages name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATELIER_OUTPUTS", str(tmp_path / "outputs"))
    shutil.copytree(EXAMPLE, tmp_path / "my-pictures")
    return tmp_path


@pytest.mark.parametrize(
    "page", [page for page in PAGES if lines(page)], ids=lambda page: page.name
)
def test_every_command_works(page, reader):
    """Runs the commands in the order of the page."""
    for line in lines(page):
        if line.startswith(tuple(ONLY_READ)):
            read_only(line)
        else:
            assert line.startswith("python -m trainer "), (
                f"give a reason in ONLY_READ why this is not run: {line}"
            )
            assert main(shlex.split(shorter(line))[3:]) == 0, line
    assert page.name != "README.md" or (reader / "sample.png").is_file()


def read_only(line: str) -> None:
    words = shlex.split(line)
    if "trainer" in words and words[-1] != "...":
        options = build_parser().parse_args(words[words.index("trainer") + 1 :])
        assert read_settings(options).name
        for text in getattr(options, "grid", []):
            assert sweep_folder.parse_grid(text)
    elif words[:3] == ["python", "-m", "app"]:
        assert server.parse(words[3:]).ray
    elif words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_run_or_read(page):
    for language, content in blocks(page):
        if language == "toml":
            config.from_dict(tomllib.loads(content))
        elif language in ("py", "python"):
            compile(content, page.name, "exec")
            assert (page.name, language) in ELSEWHERE, (
                f"run the code of {page.name} here, or name its test in ELSEWHERE"
            )
        else:
            assert language in ("sh", *DRAWN), f"{page.name}: {language} is not checked"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_sentences_can_be_parsed(page):
    text = page.read_text(encoding="utf-8").replace("\n", " ")
    for command in re.findall(r"`python -m trainer ([^`|\[]+?)`", text):
        words = re.sub(r"\b(FOLDER|FILE|DIR|RUN_DIR)\b", "x", command)
        try:
            build_parser().parse_args(shlex.split(words))
        except SystemExit as ended:
            assert ended.code == 0 or command in WITHOUT_ARGUMENTS, (
                f"{page.name}: python -m trainer {command}"
            )


def test_the_python_code_of_the_readme_works(reader, train_tiny, tiny_base, monkeypatch):
    """The first block makes a sample with diffusers, here on a tiny base. The second trains."""
    first, second = [
        content for language, content in blocks(ROOT / "README.md") if language == "py"
    ]
    folder = train_tiny()
    named = {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": str(tiny_base),
        "outputs/runs/2026-11-22-maya/maya.safetensors": str(folder / "tiny.safetensors"),
    }
    for written, path in named.items():
        assert written in first
        first = first.replace(written, path)
    assert executed(first)["pipe"].get_active_adapters() == ["maya"]
    result = executed(shorter(second))["result"]
    assert result.status.step == 2 and result.adapter.is_file()


def test_the_script_that_trains_in_python_works(reader):
    names = executed(shorter((ROOT / "docs" / "train_in_python.py").read_text(encoding="utf-8")))
    assert len(names["losses"]) == 2 and names["result"].adapter.name == "zorbit.safetensors"
    plain, adapted = ((reader / f"zorbit-{strength}.png").read_bytes() for strength in ("0", "0.8"))
    assert plain != adapted


def executed(code: str) -> dict:
    names: dict = {"__name__": "__main__"}
    exec(compile(code, "the page", "exec"), names)
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_has_a_target(page):
    for path in re.findall(r"\]\(([a-zA-Z.][^):]*)\)", page.read_text(encoding="utf-8")):
        target, _, heading = path.partition("#")
        assert (page.parent / target).exists(), path
        titles = (
            re.findall(
                r"^#+ (.+)$", (page.parent / target).read_text(encoding="utf-8"), re.MULTILINE
            )
            if heading
            else []
        )
        anchors = [re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in titles]
        assert not heading or heading in anchors, path


def test_the_makefile_has_every_named_target():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {
        target
        for page in PAGES
        for target in re.findall(r"`make (\w+)`", page.read_text(encoding="utf-8"))
    }
    assert named >= {"demo"} and all(f"\n{target}:" in makefile for target in named)

"""The commands and code of README and docs, executed; what cannot be, read by the program's own parsers, with the reason."""

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

# What is run differs from what is written in nothing but this.
SHORTER = {
    "--set training.steps=300": "--set training.steps=2 --set saving.saves=1 --set sampling.inference_steps=2",
    '"training.steps": 300': '"training.steps": 2, "saving.saves": 1, "sampling.inference_steps": 2',
    "outputs/runs/2026-11-22-": f"outputs/runs/{date.today().isoformat()}-",
}
# What is only read, by how it begins, and why.
ONLY_READ = {
    "make ": "sets up a machine anew; `make test` is what runs this",
    "python -m trainer train sdxl": "needs a GPU and a download",
    "python -m trainer sweep sd15": "needs a download; tests/test_sweep.py runs one",
    "python -m app --ray": "needs a Ray cluster; tests/test_ray.py starts one where Ray is installed",
    "torchrun ": "needs several GPUs; tests/test_distributed.py runs two processes",
    "accelerate launch ": "needs several GPUs; tests/test_distributed.py runs two processes",
}
ELSEWHERE = {
    ("README.md", "py"): "below",
    ("api.md", "python"): "tests/browser/test_api.py, with a page to talk to",
}
DRAWN = ("text", "bat")  # pictures made of letters, and Windows' own commands


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, content) of each fenced block."""
    found = re.findall(
        r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert all(language for language, _ in found), (
        f"{page.name} has a block that does not say what it is"
    )
    return found


def lines(page: Path) -> list[str]:
    """Commands of a page, without their comments."""
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
    """A reader's working directory, with the pictures that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATELIER_OUTPUTS", str(tmp_path / "outputs"))
    shutil.copytree(EXAMPLE, tmp_path / "my-pictures")
    return tmp_path


@pytest.mark.parametrize(
    "page", [page for page in PAGES if lines(page)], ids=lambda page: page.name
)
def test_every_command_works(page, reader):
    """In order, as a reader would."""
    for line in lines(page):
        if line.startswith(tuple(ONLY_READ)):
            read_only(line)
        else:
            assert line.startswith("python -m trainer "), (
                f"say in ONLY_READ why it is not run: {line}"
            )
            assert main(shlex.split(shorter(line))[3:]) == 0, line
    assert page.name != "README.md" or (reader / "sample.png").is_file()


def read_only(line: str) -> None:
    words = shlex.split(line)
    if "trainer" in words and words[-1] != "...":
        options = build_parser().parse_args(words[words.index("trainer") + 1 :])
        assert read_settings(options).name
        assert not hasattr(options, "grid") or [sweep_folder.parse_grid(text) for text in options.grid]
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
                f"run it here, or say in ELSEWHERE where the code of {page.name} is run"
            )
        else:
            assert language in ("sh", *DRAWN), f"{page.name}: how is {language} checked?"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_sentences_are_understood(page):
    text = page.read_text(encoding="utf-8").replace("\n", " ")
    for command in re.findall(r"`python -m trainer ([^`|\[]+?)`", text):
        words = re.sub(r"\b(FOLDER|FILE|DIR|RUN_DIR)\b", "x", command)
        try:
            build_parser().parse_args(shlex.split(words))
        except SystemExit as ended:
            assert ended.code == 0 or command in BARE, f"{page.name}: python -m trainer {command}"


BARE = (
    "check",
    "caption",
    "class-pictures",
    "convert",
    "sweep",
    "train",
)  # commands spoken of without what they need


def test_the_python_code_of_the_readme_works(reader, train_tiny, tiny_base, monkeypatch):
    """One block draws with diffusers, on a tiny base instead of the named one; one trains."""
    first, second = [
        content for language, content in blocks(ROOT / "README.md") if language == "py"
    ]
    folder = train_tiny()
    named = {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": str(tiny_base),
        "outputs/runs/2026-11-22-maya/maya.safetensors": str(folder / "tiny.safetensors"),
    }
    for written, there in named.items():
        assert written in first
        first = first.replace(written, there)
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
def test_every_link_leads_somewhere(page):
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
        assert not heading or heading in [
            re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in titles
        ], path


def test_make_knows_what_the_pages_name():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {
        target
        for page in PAGES
        for target in re.findall(r"`make (\w+)`", page.read_text(encoding="utf-8"))
    }
    assert named >= {"demo"} and all(f"\n{target}:" in makefile for target in named)

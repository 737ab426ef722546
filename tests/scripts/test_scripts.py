"""Checks of the page's scripts in app/static, by the tools that package.json names."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from app import gradio_compat

ROOT = Path(__file__).parents[2]
SCRIPTS = ("app/static", "tests/scripts")
TOOLS = ROOT / "node_modules" / ".bin"
TIMEOUT = 300  # seconds

CHECKS = {
    "prettier": ("prettier", "--check", *SCRIPTS),
    "eslint": ("eslint", *SCRIPTS),
    "tsc, strict": ("tsc", "--project", "tests/scripts"),
    "tsc, views": ("tsc", "--project", "tests/scripts/tsconfig.views.json"),
    "node": ("node", "--test", *sorted(map(str, Path(__file__).parent.glob("*.test.js")))),
}

needs_node = pytest.mark.skipif(
    not TOOLS.is_dir() or shutil.which("node") is None,
    reason="run npm install to check the page's scripts",
)


@needs_node
@pytest.mark.timeout(TIMEOUT + 30)
@pytest.mark.parametrize("name", CHECKS)
def test_scripts_pass_check(name: str) -> None:
    tool, *arguments = CHECKS[name]
    program = "node" if tool == "node" else TOOLS / tool
    result = subprocess.run(
        [program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_stub_of_gradio_module_equals_the_served_one() -> None:
    stub = (Path(__file__).parent / "stubs" / "gradio.js").read_text(encoding="utf-8")
    body = stub[stub.index("{") : stub.rindex("}") + 1]
    as_json = re.sub(r"^\s*(\w+):", r'"\1":', body, flags=re.MULTILINE)
    selectors = json.loads(re.sub(r",\s*}$", "}", as_json))
    assert selectors == dict(gradio_compat.SELECTORS)


def test_scripts_look_for_markup_of_gradio_only_by_selectors() -> None:
    markup = re.compile(r"\[role=(tab|combobox)\b|/gradio_api/|gradio_config")
    users = [
        path.name
        for path in (ROOT / "app" / "static").rglob("*.js")
        if markup.search(path.read_text(encoding="utf-8"))
    ]
    assert not users, f"use SELECTORS of app/gradio_compat.py in {users}"

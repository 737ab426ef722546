"""Who may import whom (docs/architecture.md). Direction only; style is judged by readers."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCH_FREE = {
    "errors",
    "config",
    "presets",
    "events",
    "guidance",
    "run_folder",
    "dataset",
    "captions",
    "findings",
    "inspection",
    "journal",
    "caption",
    "crops",
    "caption_edits",
    "cures",
    "doctor",
    "tokens",
    "pictures",
    "importing",
    "buckets",
    "estimate",
    "targets",
    "base_model",
    "checkpoint",
    "hub",
    "safetensors_header",
    "files",
    "storage",
    "report",
    "foreign_configs",
    "launch",
    "sweep",
}
# Each module of the engine may import those on the levels below its own, and on its own level none.
LEVELS = [
    {"convolutions", "errors", "fused_lora", "launch"},
    {"config", "safetensors_header", "files", "distributed"},
    {"checkpoint"},
    {
        "events",
        "presets",
        "base_model",
        "buckets",
        "foreign_configs",
        "adapted",
        "adapter_keys",
        "targets",
    },
    {"guidance"},
    {"run_folder", "pictures", "findings", "hub", "adapter_file"},
    {"storage", "report", "captions", "inspection", "tokens", "journal", "tracking"},
    {"doctor", "crops", "sweep"},
    {"dataset", "caption_edits", "estimate", "batches", "device", "libraries", "attention"},
    {"variants", "probe"},
    {
        "importing",
        "cures",
        "caption",
        "cache",
        "adapters",
        "objective",
        "optimizers",
        "quantization",
        "state",
        "memory",
    },
    {"families.base"},
    {"graphs"},
    {"families.latent_diffusion"},
    {"families.sd1", "families.sd2", "families.sd3", "families.sdxl", "families.single_file"},
    {"families"},
    {"export", "stack", "metadata", "examples"},
    {"textual_inversion"},
    {"tools"},
    {"learned"},
    {"sample", "info"},
    {"class_pictures"},
    {"start_from"},
    {"prepare"},
    {"step"},
    {"train"},
    {"demo", "terminal", "tool_commands"},
    {"running"},
    {"__main__"},
]


def modules(package: str) -> dict[str, Path]:
    """Module name below the package -> file; the embedded model's making and scoring stand apart."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT / package).with_suffix("").parts
        if parts[0] != "embedded":
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, package: str) -> set[str]:
    """What a file imports, as dotted names; those of its own package without its name in front."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = node.module or ""
            if node.level:
                parent = f"{package}.{parent}".rstrip(".")
            names |= {parent, *(f"{parent}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("package", ["app", "trainer"])
def test_the_page_and_the_engine_meet_only_in_the_torch_free_modules(package):
    for name, path in modules(package).items():
        used = imports(path, package)
        if package == "trainer":
            assert not any(i.split(".")[0] in ("app", "gradio") for i in used), name
        else:
            engine = {i.split(".")[1] for i in used if i.startswith("trainer.")}
            assert engine <= TORCH_FREE | {"__version__"} and not any(
                i.split(".")[0] in ("torch", "diffusers", "transformers", "peft") for i in used
            ), name


def test_imports_in_the_engine_point_down():
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    for name, path in modules("trainer").items():
        if not name:
            continue
        assert name in level, f"say in LEVELS where trainer/{name} stands"
        for imported in imports(path, "trainer"):
            other = imported.removeprefix("trainer.")
            if imported.startswith("trainer.") and other in level and other != name:
                assert level[other] < level[name], f"{name} imports {other}"


def test_the_page_about_the_architecture_names_every_module():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = set(
        re.findall(
            r"`(\w+)`", page[page.index("| concern |") : page.index("The torch-free modules")]
        )
    )
    assert table == {name.partition(".")[0] for name in modules("trainer") if name}


def test_no_family_is_named_outside_its_folder():
    for name, path in modules("trainer").items():
        if not name.startswith("families"):
            families = {
                f"trainer.{module}"
                for module in modules("trainer")
                if module.startswith("families.")
            } - {"trainer.families.base"}
            assert not families & imports(path, "trainer"), name


def test_the_torch_free_modules_bring_in_no_torch():
    present = sorted(name for name in TORCH_FREE if (ROOT / "trainer" / f"{name}.py").exists())
    heavy = ("torch", "diffusers", "transformers", "peft", "gradio")
    code = f"import sys; [__import__('trainer.' + name) for name in {present}]; print([m for m in sys.modules if m in {heavy}])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
        ).stdout.strip()
        == "[]"
    )


@pytest.mark.parametrize("package", ["app", "trainer"])
def test_no_shell_no_eval_and_no_pickle(package):
    """T1, T4: what a stranger typed is never run."""
    for name, path in modules(package).items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in (
                    "eval",
                    "exec",
                    "os.system",
                    "os.popen",
                    "torch.load",
                    "pickle.load",
                    "pickle.loads",
                ), name
                assert not any(
                    k.arg in ("shell", "trust_remote_code") and ast.unparse(k.value) != "False"
                    for k in node.keywords
                ), name

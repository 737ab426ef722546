"""Which folder may import which, and which modules work without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ENGINE_IMPORTS = {
    "config": "",
    "config.interop": "config",
    "runs": "config",
    "models": "config runs",
    "lora.formats": "models",
    "families": "config models lora.formats",
    "data": "config runs models families",
    "lora": "config runs models families lora.formats",
    "curation": "runs models data",
    "inference": "config runs models families data lora lora.formats",
    "training": "config runs models families data lora lora.formats inference",
    "cli": "config runs models families data lora lora.formats curation inference training "
    "embedded",
    "embedded": "",
}
"""Each folder of `trainer/` and the folders it may import. `trainer.errors` is open to all."""

PAGE_IMPORTS = {
    "accounts": "gradio_compat",
    "gradio_compat": "",
    "jobs": "accounts",
    "settings": "",
    "views": "jobs settings",
    "actions": "jobs settings views",
    "page": "jobs gradio_compat",
    "tabs": "jobs settings views actions page gradio_compat",
    "": "accounts gradio_compat jobs settings views actions page tabs",
}
"""Each folder of `app/`, or a module that stands alone, and what of `app/` it may import."""

NEEDS_TORCH = {
    "config": set(),
    "config.interop": set(),
    "runs": set(),
    "models": {"attention", "cpu_conv", "device", "libraries", "quantization", "seeds"},
    "data": {"examples", "latent_cache", "sampler"},
    "curation": set(),
    "inference": None,
    "lora": None,
    "training": None,
}
"""The folders that the page may import, and which of their modules load torch. None: nearly all."""

WORK_WITHOUT_TORCH = {
    "inference": {"request"},
    "lora": {"targets"},
    "training": {"estimate", "launch"},
}
HEAVY = ("torch", "diffusers", "transformers", "peft", "gradio")


def modules(package: str) -> dict[str, Path]:
    """Returns the file of every module of a package, by its dotted name below the package."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT / package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def folder_of(module: str, folders: set[str]) -> str:
    """Returns the longest folder of the table that contains the module, or "" for the root."""
    while module and module not in folders:
        module = module.rpartition(".")[0]
    return module


def imports(path: Path) -> set[str]:
    """Returns every module that a file imports, as dotted names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: write absolute imports"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def torch_free() -> set[str]:
    """Returns the modules of the engine that the page may import."""
    free = {"", "errors"}
    for name in modules("trainer"):
        folder = folder_of(name, set(NEEDS_TORCH))
        if not folder:
            continue
        module = name.removeprefix(folder).strip(".")
        with_torch = NEEDS_TORCH[folder]
        if with_torch is None:
            if module == "" or module.split(".")[0] in WORK_WITHOUT_TORCH[folder]:
                free.add(name)
        elif module not in with_torch:
            free.add(name)
    return free


@pytest.mark.parametrize(("package", "table"), [("trainer", ENGINE_IMPORTS), ("app", PAGE_IMPORTS)])
def test_a_folder_imports_only_the_folders_of_its_row(package, table):
    for name, path in modules(package).items():
        folder = folder_of(name, set(table))
        if package == "trainer" and not folder:
            continue  # __init__, __main__ and errors
        allowed = {folder, *table[folder].split()}
        for imported in imports(path):
            if not imported.startswith(f"{package}."):
                continue
            target = folder_of(imported.removeprefix(f"{package}."), set(table))
            is_root = package == "trainer" and not target
            assert is_root or target in allowed, f"{path} imports {imported}"


@pytest.mark.parametrize("table", [ENGINE_IMPORTS, PAGE_IMPORTS])
def test_no_two_folders_import_each_other(table):
    seen: set[str] = set()
    waiting = dict(table)
    while waiting:
        ready = [name for name, allowed in waiting.items() if set(allowed.split()) <= seen]
        assert ready, f"these rows form a cycle: {sorted(waiting)}"
        seen |= set(ready)
        for name in ready:
            del waiting[name]


def test_the_engine_knows_nothing_of_the_page():
    for path in modules("trainer").values():
        assert not {name.split(".")[0] for name in imports(path)} & {"app", "gradio"}, path


def test_the_page_imports_only_modules_of_the_engine_that_work_without_torch():
    free = {f"trainer.{name}".rstrip(".") for name in torch_free()}
    for path in modules("app").values():
        for imported in imports(path):
            assert imported.split(".")[0] not in ("torch", "diffusers", "transformers", "peft")
            if imported.startswith("trainer"):
                owner = imported if imported in free else imported.rpartition(".")[0]
                assert owner in free, f"{path} imports {imported}"


def test_those_modules_load_no_torch():
    names = sorted(f"trainer.{name}".rstrip(".") for name in torch_free())
    code = (
        f"import sys; [__import__(name) for name in {names}];"
        f"print([name for name in sys.modules if name in {HEAVY}])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.strip() == "[]"


def test_no_family_is_named_outside_its_folder():
    families = {f"trainer.{name}" for name in modules("trainer") if name.startswith("families.")}
    open_to_all = {"trainer.families.base", "trainer.families.objective"}
    for name, path in modules("trainer").items():
        if not name.startswith("families"):
            owners = {imported.rpartition(".")[0] for imported in imports(path)} | imports(path)
            assert not owners & (families - open_to_all), path


@pytest.mark.parametrize("package", ["app", "trainer"])
def test_every_folder_says_in_its_docstring_what_lives_there(package):
    for path in (ROOT / package).rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


@pytest.mark.parametrize("package", ["app", "trainer"])
def test_files_and_folders_stay_small_enough_to_read(package):
    for path in modules(package).values():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines: split it"
        siblings = [p for p in path.parent.glob("*.py") if not p.name.startswith("__")]
        assert len(siblings) <= 14, f"{path.parent} has {len(siblings)} modules"
    entries = [
        path for path in (ROOT / "trainer").iterdir() if not path.name.startswith(("__", "."))
    ]
    assert len(entries) <= 12, sorted(path.name for path in entries)


@pytest.mark.parametrize("package", ["app", "trainer"])
def test_no_shell_no_eval_and_no_pickle(package):
    """T1, T4: text that a stranger typed is never executed."""
    forbidden = [
        "eval",
        "exec",
        "os.system",
        "os.popen",
        "torch.load",
        "pickle.load",
        "pickle.loads",
    ]
    for path in modules(package).values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            assert ast.unparse(node.func) not in forbidden, path
            for keyword in node.keywords:
                if keyword.arg in ("shell", "trust_remote_code"):
                    assert ast.unparse(keyword.value) == "False", path

"""Fixtures of most tests: a tiny base, a small dataset and a short run. None uses the network."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models are slower with more threads
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer import config
from trainer.runs import run_folder, run_status


@pytest.fixture(scope="session", autouse=True)
def session_outputs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Moves the outputs of tests that do not use the fixture `outputs` to a temporary folder."""
    os.environ["ATELIER_OUTPUTS"] = str(tmp_path_factory.mktemp("outputs"))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import save_tiny_base

    return save_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a function from a kind, such as "sdxl", to its tiny base, which is written once."""
    from tests.tiny import save_tiny_base

    folders: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = save_tiny_base(tmp_path_factory.mktemp(kind) / "base", kind=kind)
        return folders[kind]

    return get


@pytest.fixture
def load(base_of: Callable[[str], Path]) -> Callable[[str], Any]:
    """Returns a function from a kind to a newly loaded tiny base in float32."""
    import torch

    from trainer.families import load_base

    return lambda kind: load_base(config.Base(model=str(base_of(kind))), torch.float32)


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import make_dataset

    return make_dataset(
        tmp_path_factory.mktemp("tiny") / "dataset", count=4, sizes=((16, 16), (24, 16))
    )


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Gives the test an empty outputs folder."""
    monkeypatch.setenv("ATELIER_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path / "outputs"


@pytest.fixture
def tiny_run(tiny_base: Path, tiny_dataset: Path, outputs: Path) -> Callable[..., config.RunConfig]:
    """Makes settings of a run of six short steps, with changes: tiny_run({"adapter.rank": 2})."""

    def make(changes: dict | None = None) -> config.RunConfig:
        settings = {
            "name": "tiny",
            "base.model": str(tiny_base),
            "dataset.folder": str(tiny_dataset),
            "dataset.resolution": 32,
            "dataset.bucket_step": 8,
            "training.steps": 6,
            "training.batch_size": 2,
            "training.learning_rate": 1e-2,
            "training.warmup": 0.0,
            "adapter.rank": 2,
            "adapter.alpha": 4.0,
            "saving.saves": 2,
            "saving.state_every": 2,
            "sampling.inference_steps": 2,
            "sampling.prompts": ["picture number 0"],
        }
        return config.replace(config.RunConfig(), settings | (changes or {}))

    return make


@pytest.fixture
def train_tiny(tiny_run: Callable[..., config.RunConfig]) -> Callable[..., Path]:
    """Trains a tiny run in this process and returns its folder."""

    def run(changes: dict | None = None) -> Path:
        from trainer.training.runner import run_in

        folder = run_folder.create(tiny_run(changes))
        assert run_in(folder) == 0, run_status.read_status(folder).message
        return folder

    return run

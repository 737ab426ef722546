"""A fixture of the families' tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.runs import events, run_folder


@pytest.fixture
def session_of(base_of: Callable[[str], Path], tiny_run: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that prepares a training on a kind of base, without caption dropout."""
    from trainer.training import setup

    def make(kind: str, **changes: Any) -> Any:
        run = tiny_run({"base.model": str(base_of(kind)), "dataset.caption_dropout": 0.0} | changes)
        folder = run_folder.create(run)
        return setup.prepare(run, folder, events.EventLog(folder / "events.jsonl"))

    return make

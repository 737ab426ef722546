"""Whose folders a request works in: where several people sign in, each has runs, datasets and caches of their own."""

from contextvars import ContextVar
from pathlib import Path

from trainer.runs import run_folder

SCOPE_KEY = "atelier_user"  # where the guard puts the name into the request
user: ContextVar[str] = ContextVar("user", default="")


def signed_in() -> str:
    """Gradio's queue works in tasks of its own and hands the request over; every other route works in the request's own context."""
    from gradio.context import (
        LocalContext,  # not before the server has told Gradio what it may send home
    )

    asked = LocalContext.request.get(None)
    scope = getattr(getattr(asked, "request", None), "scope", None)
    return user.get() if scope is None else scope.get(SCOPE_KEY, "")


def separate() -> None:
    """From here on `run_folder.outputs_folder` gives each person their own."""
    run_folder.current_user = signed_in


def all_runs_folders() -> list[Path]:
    """The runs folders of everyone: what has to share the device."""
    root = run_folder.outputs_root()
    return [root / "runs", *sorted((root / run_folder.USERS_FOLDER).glob("*/runs"))]

"""Which person's folders a request uses.

If several people sign in, each person has separate runs, datasets and caches.
"""

from contextvars import ContextVar
from pathlib import Path

from app import gradio_compat
from trainer.runs import run_folder

SCOPE_KEY = "atelier_user"
"""The key of the name in the scope of a request, set by `app.security`."""
user: ContextVar[str] = ContextVar("user", default="")


def signed_in() -> str:
    """Returns the name of the person who sent the present request, "" if nobody signed in.

    All routes run in the context of the request, except the handlers of Gradio.
    """
    scope = gradio_compat.request_scope()
    if scope is None:
        return user.get()
    return str(scope.get(SCOPE_KEY, ""))


def separate() -> None:
    """Gives each person a separate outputs folder from now on."""
    run_folder.current_user = signed_in


def all_runs_folders() -> list[Path]:
    """Returns the runs folders of everyone, because all of them share the device."""
    root = run_folder.outputs_root()
    return [root / "runs", *sorted((root / run_folder.USERS_FOLDER).glob("*/runs"))]

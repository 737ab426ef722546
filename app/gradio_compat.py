"""Everything that relies on Gradio's internals, with the reason for each. Checked on Gradio 6.31.0.

Gradio does not promise to keep any of this. `tests/app/test_gradio_compat.py` fails with a clear
message if a release changes one of them. No other module may use private attributes of Gradio, its
routes, or the markup of its components.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHECKED_VERSION = "6.31.0"

SCRIPT_ROUTE = "/atelier/"
"""Our scripts and styles. Gradio uses `/static/` and `/assets/` itself."""

UPLOAD_ROUTE = "/gradio_api/upload"
VIEW_CALL_ROUTE = "/gradio_api/component_server"
FILE_ROUTES = ("/gradio_api/file=", "/gradio_api/file/", "/file=")

OPEN_ROUTES = frozenset(
    {
        "/",
        "/config",
        "/theme.css",
        "/favicon.ico",
        "/robots.txt",
        "/manifest.json",
        "/gradio_api/info",
        "/gradio_api/app_id",
        "/gradio_api/startup-events",
        "/gradio_api/login_check",
        "/gradio_api/cancel",
        "/gradio_api/reset",
        "/gradio_api/queue/join",
        "/gradio_api/queue/data",
        "/gradio_api/upload_progress",
        UPLOAD_ROUTE,
        VIEW_CALL_ROUTE,
    }
)
"""The routes that the page and `gradio_client` need. A trailing slash does not matter.

The guard answers 404 to all others, so a route that a new release adds or renames starts closed.
Gradio 6.31 also opens `/monitoring`, `/proxy=`, `/vibe-edit`, `/dev/reload` and many more.
"""

OPEN_PREFIXES = (
    "/assets/",
    "/static/",
    "/svelte/",
    "/gradio_api/heartbeat/",
    "/gradio_api/call/",
    *FILE_ROUTES,
)
"""Routes with a parameter: scripts of Gradio's page, its heartbeat, calls of the API, files."""

SELECTORS: Mapping[str, str] = {
    "tab": "#tabs [role=tab]",
    "selectedTab": "#tabs [role=tab][aria-selected=true]",
    "listInput": "input[role=combobox]",
    "accordionButton": ":scope > button",
    "openAccordion": ".open",
    "pageConfig": "gradio_config",
    "viewCallRoute": VIEW_CALL_ROUTE,
}
"""What the scripts of the views rely on. The server offers it to them as the module `gradio.js`.

`accordionButton` opens a section of the advanced settings and has the class `openAccordion` while
the section is open. `listInput` is the text box of a dropdown, which keeps its list open when Tab
leaves it and takes the first match on Enter. `pageConfig` is the global variable with the ids of
all components, and `viewCallRoute` calls a server function: the caption that is being typed when
the page is left must be sent by a request with `keepalive`, which Gradio's calls do not have.
"""


def configure(uploads: Path) -> None:
    """Sets the variables that Gradio reads when it is imported, so call this before the import."""
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    # The server would otherwise call api.gradio.app and huggingface.co at every start.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # Each tab polls once a second, and Gradio keeps 4 kB of each of the last 10,000 events.
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "100"


def accept_any_choice() -> None:
    """Lets values that are not among the choices reach our checks, which name the field.

    Gradio refuses such a value in `preprocess`, before any handler runs, with a generic message. A
    choice can disappear while the page is open, and a number can be typed outside its bounds. A
    subclass is not possible: the browser would look for a custom component of that name.
    """
    import gradio as gr

    def preprocess(self: Any, payload: Any) -> Any:
        return payload

    for component in (gr.Radio, gr.Dropdown, gr.Slider):
        component.preprocess = preprocess


def request_scope() -> Mapping[str, Any] | None:
    """Returns the ASGI scope of the request that a handler of Gradio answers, or None.

    Gradio's queue runs handlers in other tasks, so context variables of the request are lost there.
    It passes the request on in `LocalContext`.
    """
    # Imported late: `configure` must run before Gradio is imported.
    from gradio.context import LocalContext

    request = LocalContext.request.get(None)
    scope: Mapping[str, Any] | None = getattr(getattr(request, "request", None), "scope", None)
    return scope


def is_open(path: str) -> bool:
    """Returns whether the guard lets a route of Gradio through."""
    exact = path if path == "/" else path.removesuffix("/")
    return exact in OPEN_ROUTES or path.startswith(OPEN_PREFIXES)

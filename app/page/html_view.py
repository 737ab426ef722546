"""Views that the browser draws: Python sends JSON, a script in `static/views` makes elements of it.

Texts of people only ever become text nodes. Gradio evaluates a rendered `html_template` as a
JavaScript template literal, so a caption in it would run as code. The template here is constant.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import Any

import gradio as gr

from app import gradio_compat
from trainer.errors import TrainerError

STATIC = Path(__file__).parents[1] / "static"

Answer = Mapping[str, object]
"""The answer of a server function, as JSON. The key "error" contains a message."""
Handler = Callable[[dict[str, Any]], Answer]
"""A server function."""


def with_messages(handle: Handler) -> Handler:
    """Returns a server function that sends the messages of errors to the browser."""

    @wraps(handle)
    def answer(data: Any) -> Answer:
        if not isinstance(data, dict):
            return {"error": "The request could not be read. Reload the page."}
        try:
            return handle(data)
        except TrainerError as error:
            return {"error": str(error)}
        except OSError as error:
            return {"error": f"A file could not be written or read: {error.strerror}."}

    return answer


@cache
def static_version() -> str:
    """Returns a hash of all scripts, so that browsers can cache each version forever."""
    digest = hashlib.sha256(json.dumps(dict(gradio_compat.SELECTORS)).encode())
    for path in sorted(STATIC.rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(STATIC).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def script_url(name: str) -> str:
    """Returns the address of a script below `static`, such as "views/header.js"."""
    return f"{gradio_compat.SCRIPT_ROUTE}{static_version()}/{name}"


def html_view(
    script: str,
    *,
    elem_id: str,
    data: Any = None,
    events: Sequence[str] = (),
    server_functions: Sequence[Handler] = (),
    constant: Any = None,
) -> gr.HTML:
    """Returns a component that `static/views/<script>.js` draws.

    The script exports `mount(gradio)`. `gradio` contains `element`, `props`, `trigger`, `server`,
    `upload` and `watch` of Gradio, and `constant`.

    This is a function and not a subclass of `gr.HTML`: Gradio 6.31 writes a stub file beside the
    module of every subclass, and creates copies of it with the arguments of `gr.HTML`.

    Args:
        script: Name of the script.
        data: The first data, which `props.value` contains. Without data the view stays empty.
        events: Names of the events that the script triggers. Each becomes a method that connects a
            handler, such as `view.go_train(...)`.
        server_functions: Functions that the script calls by their names, as `server.name(data)`.
            The messages of their errors reach the script as {"error"}.
        constant: JSON that never changes.
    """
    # Gradio offers an event only if its quoted name is part of this text.
    js_on_load = (
        f"const events = {json.dumps(list(events))};\n"
        f"const constant = {json.dumps(constant)};\n"
        f"import({json.dumps(script_url(f'views/{script}.js'))}).then((view) =>\n"
        "  view.mount({ element, props, trigger, server, upload, watch, constant }));"
    )
    return gr.HTML(
        data,
        html_template='<div class="atelier"></div>',
        apply_default_css=False,
        elem_id=elem_id,
        js_on_load=js_on_load,
        server_functions=[with_messages(handle) for handle in server_functions] or None,
    )

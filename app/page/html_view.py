"""Views that the browser draws: Python sends plain data, a script in `static/` turns it into elements.

User text only ever becomes a text node. (Gradio evaluates what an `html_template` renders as a JavaScript
template literal, so a caption put there would run as code; the templates here are therefore constant.)
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr

STATIC = Path(__file__).parents[1] / "static"


@cache
def read_static(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


def drawn(
    script: str,
    *more: str,
    data: Any = None,
    elem_id: str,
    server_functions: list[Callable] | None = None,
    constant: Any = None,
) -> gr.HTML:
    """A view drawn by `static/<script>.js` and the scripts it uses from JSON-like data; `constant` never changes, there as CONSTANT."""
    parts = "".join(read_static(f"{name}.js") for name in ("common", *more, script))
    return gr.HTML(
        data,
        html_template='<div class="atelier"></div>',
        apply_default_css=False,
        elem_id=elem_id,
        js_on_load=f"const CONSTANT = {json.dumps(constant)};\n{parts}",
        server_functions=server_functions,
    )

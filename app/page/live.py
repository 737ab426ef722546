"""Live updates: how components of the tabs follow the run folders.

Every open window polls once a second. The data of all views is computed once per second and person,
however many windows are open, and a window receives only the views that changed.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app.jobs.previews import PreviewEngine
from app.jobs.ttl_cache import ttl_cached
from trainer.runs import run_folder

INTERVAL = 1.0
"""Seconds between two polls of a window."""

PRIVATE: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""Options of an event inside the page: no progress overlay, and not part of the API."""

KEEP_LATEST = PRIVATE | {"trigger_mode": "always_last"}
"""Options of an event that follows a choice.

Gradio's default drops a choice that is made while an earlier one is being handled.
"""


@dataclass(frozen=True)
class Live:
    """A component, the function that returns its data, and how the data becomes an update."""

    component: gr.components.Component
    data: Callable[[], Any]
    to_update: Callable[[Any], Any]


@dataclass(frozen=True)
class Load:
    """A handler that fills components when a browser opens the page, and the event after it."""

    handler: Callable[[], list[Any]]
    outputs: list[Any]
    then: dict[str, Any]


class Page:
    """The tabs, the preview engine, and the components that follow the run folders."""

    def __init__(self, tabs: gr.Tabs, engine: PreviewEngine, device: str):
        self.tabs = tabs
        self.engine = engine
        self.device = device
        self.live: list[Live] = []
        self.loads: list[Load] = []
        # Two windows of one person see the same runs, so they share the data of a second.
        self._shared_data = ttl_cached(0.9 * INTERVAL, key=run_folder.runs_folder)(self._data)

    def follow(
        self,
        component: gr.components.Component,
        data: Callable[[], Any],
        to_update: Callable[[Any], Any] = lambda data: data,
    ) -> None:
        """Keeps a component up to date with `data()`, which must return JSON-like values."""
        self.live.append(Live(component, data, to_update))

    def on_load(
        self,
        handler: Callable[[], list[Any]],
        outputs: list[Any],
        then: dict[str, Any] | None = None,
    ) -> None:
        """Fills components when a browser opens the page. `then` is the event that follows."""
        self.loads.append(Load(handler, outputs, then or {}))

    def tick(self, sent: dict[int, str]) -> list[Any]:
        """Returns the digests that a window now has, and an update or a skip for each view.

        `sent` contains the digest of the data that the window received last, by view.
        """
        shared = self._shared_data()
        now = {number: digest for number, (digest, _) in enumerate(shared)}
        updates = [
            gr.skip() if sent.get(number) == digest else self.live[number].to_update(data)
            for number, (digest, data) in enumerate(shared)
        ]
        return [gr.skip() if now == sent else now, *updates]

    def _data(self) -> list[tuple[str, Any]]:
        """Returns digest and data of every view. A window keeps the digest, not the data."""
        return [(_digest(data := live.data()), data) for live in self.live]


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

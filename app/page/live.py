"""What the tabs share: the live views, the preview engine, and how the page is told to follow the runs."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from app.jobs.previews import PreviewEngine

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""An event between the controls of the page: without Gradio's veil over them, and no part of the API."""

LATEST = QUIET | {"trigger_mode": "always_last"}
"""One that follows what a person chooses. Gradio's default forgets a choice that is made while an earlier one is being answered."""


def answer_for_ourselves() -> None:
    """What was chosen comes to our own checks, which name the field, also when it is gone meanwhile or no number.

    Gradio would refuse it in words of its own before, and leave the button dead.
    """
    for component in (gr.Radio, gr.Dropdown, gr.Slider):
        component.preprocess = lambda self, payload: payload


@dataclass(frozen=True)
class Live:
    """A component that follows the run folders: `data()` is asked each second, and sent only when it changed."""

    component: gr.components.Component
    data: Callable[[], Any]
    to_update: Callable[[Any], Any] = lambda data: data


@dataclass
class Page:
    tabs: gr.Tabs
    engine: PreviewEngine
    device: str
    live: list[Live] = field(default_factory=list)
    loads: list[tuple[Callable[[], list], list, dict]] = field(default_factory=list)

    def follow(
        self,
        component: gr.components.Component,
        data: Callable[[], Any],
        to_update: Callable[[Any], Any] = lambda data: data,
    ) -> None:
        self.live.append(Live(component, data, to_update))

    def on_load(self, handler: Callable[[], list], outputs: list, then: dict | None = None) -> None:
        """Fills components when a browser opens the page; `then` is the event that follows."""
        self.loads.append((handler, outputs, then or {}))

    def tick(self, sent: dict[int, str]) -> list[Any]:
        """New data for the views that changed since this browser's last tick; the rest is skipped."""
        now = dict(sent)
        updates = []
        for number, live in enumerate(self.live):
            data = live.data()
            text = hashlib.sha256(
                json.dumps(data, sort_keys=True).encode()
            ).hexdigest()  # each open window keeps one of each view
            updates.append(gr.skip() if sent.get(number) == text else live.to_update(data))
            now[number] = text
        return [gr.skip() if now == sent else now, *updates]

"""Library tab: every run as a card, to download, preview, repeat or delete."""

from typing import Any

import gradio as gr

from app import runs, views
from app.drawn import drawn
from app.page import Page
from app.tabs.train import act
from trainer import storage

ID, TITLE = "library", "Library"
QUIET = {"show_progress": "hidden", "api_visibility": "private"}


def build(page: Page) -> dict[str, Any]:
    cards = drawn("library", elem_id="library-view", server_functions=[act, clear_cache])
    page.follow(cards, views.library)
    return {"cards": cards}


def clear_cache(data: dict) -> dict:
    """Latents, embeddings, thumbnails and previews go; they are made anew when they are needed."""
    freed = storage.clear()
    views.cache_size.forget()
    return {"text": f"{views.size(freed)} freed"}


def connect(page: Page, own: dict, others: dict[str, dict]) -> None:
    preview, train = others["preview"], others["train"]

    def open_preview(event: gr.EventData) -> list:
        return [gr.Tabs(selected="preview"), *preview["choose_run"](event.run)]

    def train_again(event: gr.EventData) -> list:
        return [gr.Tabs(selected="train"), *train["show_settings"](runs.settings(runs.resolve(event.run)))]

    own["cards"].open_preview(open_preview, None, [page.tabs, *preview["run_outputs"]], **QUIET)
    own["cards"].train_again(train_again, None, [page.tabs, *train["outputs"]], **QUIET).then(**train["line_update"])
    own["cards"].go_train(lambda: gr.Tabs(selected="train"), None, page.tabs, **QUIET)

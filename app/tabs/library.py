"""Library tab: every run as a card, to find, compare, download, preview, repeat, share or delete."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import gradio as gr

from app.actions import adapter_tools, library, publishing
from app.jobs import runs
from app.page.html_view import drawn
from app.page.live import QUIET, Page
from app.tabs.train import act
from app.views import formatting, run_cards
from trainer.errors import TrainerError
from trainer.runs import cache_limits

ID, TITLE = "library", "Library"


def build(page: Page) -> dict[str, Any]:
    handlers = [
        answered(handle)
        for handle in (
            describe,
            delete,
            restore,
            compare,
            model_card,
            push,
            look_into,
            make_file,
            tool_state,
        )
    ]
    cards = drawn("library", elem_id="library-view", server_functions=[act, clear_cache, *handlers])
    page.follow(cards, run_cards.library_view)
    return {"cards": cards}


def answered(
    handle: Callable[[dict], Mapping[str, object]],
) -> Callable[[dict], Mapping[str, object]]:
    """A server function whose TrainerErrors reach the browser as sentences."""

    @wraps(handle)
    def answer(data):
        try:
            return handle(data if isinstance(data, dict) else {})
        except TrainerError as error:
            return {"error": str(error)}

    return answer


def describe(data: dict) -> dict:
    library.describe(data.get("run"), data.get("name"), data.get("tags"))
    return {"ok": True}


def delete(data: dict) -> dict:
    library.delete(data.get("run"))
    return {"ok": True}


def restore(data: dict) -> dict:
    library.restore(data.get("run"))
    return {"ok": True}


def compare(data: dict) -> Mapping[str, object]:
    return library.compare(data.get("first"), data.get("second"))


def model_card(data: dict) -> dict:
    return {"text": publishing.model_card(data.get("run"))}


def push(data: dict) -> dict:
    return {
        "address": publishing.push(
            data.get("run"), data.get("repository"), data.get("private") is True
        )
    }


def look_into(data: dict) -> dict:
    return {"job": adapter_tools.look(data.get("run"))}


def make_file(data: dict) -> dict:
    return {"job": adapter_tools.make(data.get("run"), data)}


def tool_state(data: dict) -> Mapping[str, object]:
    return adapter_tools.state(data.get("job"))


def clear_cache(data: dict) -> dict:
    """Latents, embeddings, thumbnails and previews go; they are made anew when they are needed."""
    freed = cache_limits.clear()
    run_cards.cache_size.forget()
    return {"text": f"{formatting.file_size(freed)} freed"}


def connect(page: Page, own: dict, others: dict[str, dict]) -> None:
    preview, train = others["preview"], others["train"]

    def open_preview(event: gr.EventData) -> list:
        return [gr.Tabs(selected="preview"), *preview["choose_run"](event.run)]

    def train_again(event: gr.EventData) -> list:
        return [
            gr.Tabs(selected="train"),
            *train["show_settings"](runs.settings(runs.resolve(event.run))),
        ]

    own["cards"].open_preview(open_preview, None, [page.tabs, *preview["run_outputs"]], **QUIET)
    own["cards"].train_again(train_again, None, [page.tabs, *train["outputs"]], **QUIET).then(
        **train["line_update"]
    )
    own["cards"].go_train(lambda: gr.Tabs(selected="train"), None, page.tabs, **QUIET)

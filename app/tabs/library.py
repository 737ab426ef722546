"""Library tab: every run as a card, to find, compare, download, preview, share or delete."""

from dataclasses import dataclass
from typing import Any

import gradio as gr

from app.actions import adapter_tools, library, publishing
from app.jobs import runs
from app.page.html_view import Answer, Handler, html_view
from app.page.live import PRIVATE, Page
from app.tabs.preview import PreviewTab, choose_run
from app.tabs.train import TrainTab
from app.tabs.train_actions import act
from app.tabs.train_form import Updates, show_settings
from app.views import formatting, run_cards
from trainer.runs import cache_limits

ID, TITLE = "library", "Library"


@dataclass(frozen=True)
class LibraryTab:
    """The parts of the tab that events use."""

    cards: gr.HTML


def build(page: Page) -> LibraryTab:
    """Builds the cards, which follow the run folders."""
    handlers: list[Handler] = [
        describe,
        delete,
        restore,
        compare,
        model_card,
        push,
        look_into,
        make_file,
        tool_state,
    ]
    cards = html_view(
        "library",
        elem_id="library-view",
        events=("open_preview", "train_again", "go_train"),
        server_functions=[act, clear_cache, *handlers],
    )
    page.follow(cards, run_cards.library_view)
    return LibraryTab(cards)


def connect(page: Page, tab: LibraryTab, preview: PreviewTab, train: TrainTab) -> None:
    """Connects the buttons that open a run in the Preview or the Train tab."""

    def open_preview(event: gr.EventData) -> Updates:
        return [gr.Tabs(selected="preview"), *choose_run(event.run)]

    def train_again(event: gr.EventData) -> Updates:
        run = runs.settings(runs.resolve(event.run))
        return [gr.Tabs(selected="train"), *show_settings(run)]

    tab.cards.open_preview(open_preview, None, [page.tabs, *preview.run_outputs], **PRIVATE)
    tab.cards.train_again(train_again, None, [page.tabs, *train.inputs], **PRIVATE).then(
        **train.line_update
    )
    tab.cards.go_train(lambda: gr.Tabs(selected="train"), None, page.tabs, **PRIVATE)


def describe(data: dict[str, Any]) -> Answer:
    """Sets name and tags of a run."""
    library.describe(data.get("run"), data.get("name"), data.get("tags"))
    return {"ok": True}


def delete(data: dict[str, Any]) -> Answer:
    """Moves a run to the trash."""
    library.delete(data.get("run"))
    return {"ok": True}


def restore(data: dict[str, Any]) -> Answer:
    """Restores a run from the trash."""
    library.restore(data.get("run"))
    return {"ok": True}


def compare(data: dict[str, Any]) -> Answer:
    """Returns two runs side by side."""
    return library.compare(data.get("first"), data.get("second"))


def model_card(data: dict[str, Any]) -> Answer:
    """Returns the model card of a run as Markdown."""
    return {"text": publishing.model_card(data.get("run"))}


def push(data: dict[str, Any]) -> Answer:
    """Uploads a run to the Hugging Face Hub and returns its address."""
    return {
        "address": publishing.push(
            data.get("run"), data.get("repository"), data.get("private") is True
        )
    }


def look_into(data: dict[str, Any]) -> Answer:
    """Starts to read what the adapter of a run contains."""
    return {"job": adapter_tools.look(data.get("run"))}


def make_file(data: dict[str, Any]) -> Answer:
    """Starts to make another file from the adapter of a run."""
    return {"job": adapter_tools.make(data.get("run"), data)}


def tool_state(data: dict[str, Any]) -> Answer:
    """Returns the progress of `look_into` or `make_file`."""
    return adapter_tools.state(data.get("job"))


def clear_cache(data: dict[str, Any]) -> Answer:
    """Deletes cached latents, embeddings, thumbnails and previews."""
    freed = cache_limits.clear()
    run_cards.cache_size.forget()
    return {"text": f"{formatting.file_size(freed)} freed"}

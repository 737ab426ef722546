"""Builds the page from its tabs. A new tab is a module in `tabs/` and three lines here."""

import json
from html import escape
from typing import Any

import gradio as gr

from app import api, gradio_compat
from app.jobs.previews import PreviewEngine
from app.page.html_view import html_view, script_url
from app.page.live import INTERVAL, PRIVATE, Page
from app.tabs import dataset, library, preview, train, train_actions
from app.tabs.train import TrainTab
from app.views.header import header_view

TABS = (dataset, train, preview, library)
MAX_WAITING = 200
"""Events in the queue. Further ones are refused."""


def build(engine: PreviewEngine, device: str) -> gr.Blocks:
    """Returns the page. `device` is the name of the device that trains."""
    gradio_compat.accept_any_choice()
    with gr.Blocks(
        title="LoRA Atelier", analytics_enabled=False, delete_cache=(3600, 86400)
    ) as blocks:
        heading = html_view(
            "header",
            data={"device": device, "text": "Idle"},
            elem_id="header",
            events=("go_train", "refill"),
        )
        with gr.Tabs(elem_id="tabs", overflow_behavior="wrap") as tabs:
            page = Page(tabs, engine, device)
            page.follow(heading, lambda: header_view(device))
            built, panes = {}, []
            for number, tab in enumerate(TABS, 1):
                with gr.Tab(f"{number}  {tab.TITLE}", id=tab.ID, elem_id=f"tab-{tab.ID}") as pane:
                    built[tab.ID] = tab.build(page)
                    panes.append(pane)
        dataset.connect(page, built["dataset"], built["train"])
        preview.connect(page, built["preview"])
        library.connect(page, built["library"], built["preview"], built["train"])
        _connect_train(page, built["train"], built["preview"])
        heading.go_train(lambda: gr.Tabs(selected="train"), None, tabs, **PRIVATE)
        _take_dropped_settings(heading, tabs, built["train"])
        _remember_tab(panes)
        api.build(engine)
        _load(blocks, page)
        _poll(blocks, page)
    return blocks.queue(max_size=MAX_WAITING, default_concurrency_limit=4)


def _connect_train(page: Page, tab: TrainTab, other: preview.PreviewTab) -> None:
    """Connects the Train tab with the tabs that it opens."""

    def open_preview(event: gr.EventData) -> list[Any]:
        return [gr.Tabs(selected="preview"), *preview.choose_run(event.run)]

    tab.progress.open_preview(open_preview, None, [page.tabs, *other.run_outputs], **PRIVATE)
    tab.fields["dataset.folder"].change(**tab.line_update)
    tab.line.go_dataset(lambda: gr.Tabs(selected="dataset"), None, page.tabs, **PRIVATE)


def _take_dropped_settings(heading: gr.HTML, tabs: gr.Tabs, tab: TrainTab) -> None:
    """Fills the form from a finished adapter or a settings file dropped anywhere on the page."""
    outputs = [tabs, tab.message, *tab.inputs]

    def take(event: gr.EventData, *values: Any) -> list[Any]:
        message, *fields = train_actions.take_settings(event.text, tab.by_name(values))
        if "problem" in message:
            # The open tab stays, so the message must be visible on every tab.
            gr.Warning(escape(message["problem"]), title="The dropped file")
            return [gr.skip()] * len(outputs)
        return [gr.Tabs(selected="train"), message, *fields]

    heading.refill(take, tab.inputs, outputs, **PRIVATE).then(**tab.line_update)


def _remember_tab(panes: list[gr.Tab]) -> None:
    """Writes the open tab into the address, so that a reload comes back to it."""
    for tab, pane in zip(TABS, panes, strict=True):
        change = f"history.replaceState(null, '', '?tab={tab.ID}')"
        pane.select(None, js=f"() => {{ if (window.atelierOpened) {change} }}")


def _load(blocks: gr.Blocks, page: Page) -> None:
    """Fills the page when a browser opens it."""

    def open_tab(request: gr.Request) -> Any:
        wanted = request.query_params.get("tab")
        return gr.Tabs(selected=wanted) if wanted in {tab.ID for tab in TABS} else gr.skip()

    # The first tab selects itself while the page is built. Only later changes go into the address.
    opening = blocks.load(open_tab, None, page.tabs, **PRIVATE)
    opening.then(None, js="() => { window.atelierOpened = true }")
    keys = json.dumps(script_url("keys.js"))
    blocks.load(None, js=f"() => {{ import({keys}).then((keys) => keys.install()) }}")
    for load in page.loads:
        filling = blocks.load(load.handler, None, load.outputs, **PRIVATE)
        if load.then:
            filling.then(**load.then)


def _poll(blocks: gr.Blocks, page: Page) -> None:
    """Sends the data of the views that changed, to every open window."""
    sent = gr.State({})
    event: dict[str, Any] = {
        "fn": page.tick,
        "inputs": sent,
        "outputs": [sent, *(live.component for live in page.live)],
        **PRIVATE,
        "concurrency_limit": None,
    }
    blocks.load(**event)
    gr.Timer(INTERVAL).tick(**event)

"""Builds the page out of `TABS`. A new tab is a file in `tabs/` and its name here."""

from html import escape

import gradio as gr

from app import api
from app.jobs.previews import PreviewEngine
from app.page.html_view import drawn, read_static
from app.page.live import QUIET, Page, answer_for_ourselves
from app.tabs import dataset, library, preview, train
from app.views.header import header_view

TABS = (dataset, train, preview, library)
MAX_WAITING = 200  # events in the queue; more are refused


def build(engine: PreviewEngine, device: str) -> gr.Blocks:
    answer_for_ourselves()
    with gr.Blocks(
        title="LoRA Atelier", analytics_enabled=False, delete_cache=(3600, 86400)
    ) as blocks:
        heading = drawn("header", data={"device": device, "text": "Idle"}, elem_id="header")
        with gr.Tabs(elem_id="tabs", overflow_behavior="wrap") as tabs:
            page = Page(tabs, engine, device)
            page.follow(heading, lambda: header_view(device))
            parts, panes = {}, []
            for number, tab in enumerate(TABS, 1):
                with gr.Tab(f"{number}  {tab.TITLE}", id=tab.ID, elem_id=f"tab-{tab.ID}") as pane:
                    parts[tab.ID] = tab.build(page)
                    panes.append(pane)
        for tab in TABS:
            tab.connect(page, parts[tab.ID], parts)
        heading.go_train(lambda: gr.Tabs(selected="train"), None, tabs, **QUIET)
        _refill(heading, tabs, parts["train"])
        _remember_tab(panes)
        api.build(engine)
        _load(blocks, page)
        _follow(blocks, page)
    return blocks.queue(max_size=MAX_WAITING, default_concurrency_limit=4)


def _refill(heading: gr.HTML, tabs: gr.Tabs, form: dict) -> None:
    """A finished adapter or a file of settings, dropped anywhere, is the form of the Train tab again."""

    def refilled(event: gr.EventData, *values) -> list:
        said, *fields = form["take_settings"](event.text, *values)
        if "problem" in said:  # the tab stays, and the sentence is seen on each
            gr.Warning(escape(said["problem"]), title="The dropped file")
            return [gr.skip()] * len(outputs)
        return [gr.Tabs(selected="train"), said, *fields]

    outputs = [tabs, form["said"], *form["outputs"]]
    heading.refill(refilled, form["outputs"], outputs, **QUIET).then(**form["line_update"])


def _remember_tab(panes: list[gr.Tab]) -> None:
    """The open tab is in the address, so that a reload or a reconnection comes back to it."""
    for tab, pane in zip(TABS, panes, strict=True):
        pane.select(
            None,
            js=f"() => {{ if (window.atelierOpened) history.replaceState(null, '', '?tab={tab.ID}') }}",
        )


def _load(blocks: gr.Blocks, page: Page) -> None:
    def opened(request: gr.Request):
        wanted = request.query_params.get("tab")
        return gr.Tabs(selected=wanted) if wanted in {tab.ID for tab in TABS} else gr.skip()

    # The first tab selects itself while the page is built; only what comes after the link was followed goes into the address.
    following = blocks.load(opened, None, page.tabs, **QUIET)
    following.then(None, js="() => { window.atelierOpened = true }")
    blocks.load(None, js=read_static("keys.js"))
    for handler, outputs, then in page.loads:
        filling = blocks.load(handler, None, outputs, **QUIET)
        if then:
            filling.then(**then)


def _follow(blocks: gr.Blocks, page: Page) -> None:
    sent = gr.State({})
    outputs = [sent, *(live.component for live in page.live)]
    follow = {
        "fn": page.tick,
        "inputs": sent,
        "outputs": outputs,
        **QUIET,
        "concurrency_limit": None,
    }
    blocks.load(**follow)
    gr.Timer(1.0).tick(**follow)

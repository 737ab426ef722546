"""Train tab: the form on the left, the run on the right, and the events between them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app.actions import datasets
from app.actions.records import PreflightView
from app.page.html_view import html_view
from app.page.live import KEEP_LATEST, PRIVATE, Page
from app.tabs import train_actions, train_form
from app.tabs.train_form import Updates, advanced_paths, choose_base, choose_dataset
from app.views import charts
from app.views.progress import progress_view
from app.views.samples import samples_view

ID, TITLE = "train", "Train"


@dataclass(frozen=True)
class TrainTab:
    """The parts of the tab that events use, also events of other tabs."""

    fields: dict[str, Any]
    """The widgets by field name, in the order of `train_form.field_names`."""
    line: gr.HTML
    """The line above the button, with the checks."""
    tools: gr.HTML
    """Search, presets and files above the advanced settings."""
    message: gr.HTML
    """The result of dropping a file on the page."""
    start: gr.Button
    progress: gr.HTML

    @property
    def inputs(self) -> list[Any]:
        return list(self.fields.values())

    @property
    def dataset_outputs(self) -> list[Any]:
        """The outputs of `choose_dataset`."""
        return [self.fields[name] for name in ("dataset.folder", "name", "dataset.trigger")]

    @property
    def preset_outputs(self) -> list[Any]:
        """The outputs of `choose_preset`."""
        return [self.fields[path] for path in advanced_paths()]

    def by_name(self, values: tuple[Any, ...]) -> train_form.FormValues:
        return dict(zip(self.fields, values, strict=True))

    @property
    def line_update(self) -> dict[str, Any]:
        """The event that checks the form again. It follows every change."""

        def check(*values: Any) -> list[Mapping[str, object]]:
            by_name = self.by_name(values)
            return [train_actions.summary(by_name), train_actions.changes(by_name)]

        outputs = [self.line, self.tools]
        return {"fn": check, "inputs": self.inputs, "outputs": outputs, **KEEP_LATEST}


def build(page: Page) -> TrainTab:
    """Builds the tab and the events inside it."""
    with gr.Row(elem_classes="at-columns"):
        with gr.Column(scale=2, min_width=330):
            basic = train_form.basic_widgets()
            message = html_view("message", elem_id="said")
            line = html_view(
                "estimate",
                elem_id="estimate",
                events=("cure", "take_base", "take_example", "reset", "go_dataset"),
            )
            start = gr.Button(
                "Start training", variant="primary", size="lg", elem_id="start-training"
            )
            advanced, tools = train_form.advanced_widgets()
        with gr.Column(scale=3, min_width=330):
            progress = html_view(
                "progress",
                elem_id="progress",
                events=("open_preview",),
                server_functions=[train_actions.act, train_actions.read_log],
            )
            curve = html_view("curve", elem_id="curve")
            samples = html_view("samples", elem_id="samples")
            learned = html_view(
                "learned",
                elem_id="learned",
                server_functions=[train_actions.shrink, train_actions.shrunk],
            )
    page.follow(progress, progress_view)
    page.follow(curve, charts.curve_view)
    page.follow(samples, samples_view)
    page.follow(learned, charts.learned_view)
    tab = TrainTab(basic | advanced, line, tools, message, start, progress)
    _wire_form(page, tab)
    _wire_fixes(tab)
    _wire_tools(tab)
    return tab


def _wire_form(page: Page, tab: TrainTab) -> None:
    fields, line_update = tab.fields, tab.line_update

    def start(*values: Any) -> PreflightView:
        return train_actions.start(tab.by_name(values))

    gr.on(
        [field.input for name, field in fields.items() if name not in ("base", "preset")],
        **line_update,
    )
    gr.on(
        [fields["base"].input, fields["own_base"].blur],
        choose_base,
        [fields["base"], fields["preset"], fields["own_base"]],
        [fields["own_base"], fields["preset"], *tab.preset_outputs],
        **KEEP_LATEST,
    ).then(**line_update)
    fields["preset"].input(
        train_form.choose_preset, fields["preset"], tab.preset_outputs, **KEEP_LATEST
    ).then(**line_update)
    fields["dataset.folder"].input(
        choose_dataset, fields["dataset.folder"], tab.dataset_outputs, **KEEP_LATEST
    ).then(**line_update)
    tab.start.click(start, tab.inputs, tab.line, **PRIVATE)
    page.on_load(
        lambda: choose_dataset(next(iter(datasets.names()), "")),
        tab.dataset_outputs,
        then=line_update,
    )
    known = gr.State([])
    page.follow(known, datasets.names)
    known.change(
        train_form.refresh_datasets, fields["dataset.folder"], fields["dataset.folder"], **PRIVATE
    )


def _wire_fixes(tab: TrainTab) -> None:
    """Connects the buttons that fix a check."""
    fields, line, line_update = tab.fields, tab.line, tab.line_update

    def change_settings(event: gr.EventData) -> Updates:
        return train_form.updates_for(event.changes)

    def take_base(event: gr.EventData, preset: str) -> Updates:
        return [event.base, *choose_base(event.base, preset, "")]

    def take_example(event: gr.EventData) -> Updates:
        return choose_dataset(datasets.add_example(event.example))

    line.cure(change_settings, None, tab.inputs, **PRIVATE).then(**line_update)
    base_outputs = [fields["base"], fields["own_base"], fields["preset"], *tab.preset_outputs]
    line.take_base(take_base, fields["preset"], base_outputs, **PRIVATE).then(**line_update)
    line.take_example(take_example, None, tab.dataset_outputs, **PRIVATE).then(**line_update)
    for view in (line, tab.tools):
        view.reset(train_actions.reset, fields["preset"], tab.inputs, **PRIVATE).then(**line_update)


def _wire_tools(tab: TrainTab) -> None:
    """Connects presets, and settings from and to files."""
    tools, inputs = tab.tools, tab.inputs

    def save_preset(event: gr.EventData, *values: Any) -> Updates:
        return train_actions.save_preset(event.title, tab.by_name(values))

    def remove_preset(*values: Any) -> Updates:
        return train_actions.remove_preset(tab.by_name(values))

    def export(*values: Any) -> dict[str, object]:
        return train_actions.export(tab.by_name(values))

    def import_settings(event: gr.EventData, *values: Any) -> Updates:
        return train_actions.take_settings(event.text, tab.by_name(values))

    preset_and_tools = [tab.fields["preset"], tools]
    tools.save_recipe(save_preset, inputs, preset_and_tools, **PRIVATE)
    tools.remove_recipe(remove_preset, inputs, preset_and_tools, **PRIVATE).then(**tab.line_update)
    tools.export_settings(export, inputs, tools, **PRIVATE)
    tools.import_settings(import_settings, inputs, [tools, *inputs], **PRIVATE).then(
        **tab.line_update
    )

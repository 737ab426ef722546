"""Dataset tab: adding images, their issues, captions, crops and masks."""

import os
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app.actions import (
    captioning,
    dataset_changes,
    dataset_folders,
    dataset_scans,
    dataset_view,
    datasets,
    uploads,
)
from app.page.html_view import Answer, Handler, html_view
from app.page.live import KEEP_LATEST, PRIVATE, Page
from app.tabs.train import TrainTab
from app.tabs.train_form import OWN, Updates, choose_dataset
from trainer.runs import run_folder

ID, TITLE = "dataset", "Dataset"


@dataclass(frozen=True)
class DatasetTab:
    """The parts of the tab that events use."""

    chosen: gr.Dropdown
    grid: gr.HTML


def build(page: Page) -> DatasetTab:
    """Builds the list of datasets, and the view with everything below it."""
    with gr.Row(elem_classes="at-toolbar"):
        chosen = gr.Dropdown(
            datasets.names(),
            label="Dataset",
            info="Choose one, or type a new name and press Enter.",
            allow_custom_value=True,
            elem_id="dataset",
            scale=0,
            min_width=340,
        )
    handlers: list[Handler] = [
        uploads.add_files,
        add_example,
        uploads.add_mask,
        rename_dataset,
        copy_dataset,
        remove_dataset,
        restore_dataset,
        dataset_view.view,
        dataset_view.crops_overview,
        dataset_changes.save_caption,
        dataset_changes.preview_edit,
        dataset_changes.apply_edit,
        dataset_changes.cure,
        dataset_changes.undo,
        dataset_changes.remove_picture,
        dataset_changes.move_crop,
        dataset_changes.save_mask,
        caption_start,
        caption_stop,
        caption_status,
        caption_size,
    ]
    grid = html_view(
        "dataset",
        elem_id="dataset-view",
        events=("change_dataset", "go_train"),
        server_functions=handlers,
    )
    return DatasetTab(chosen, grid)


def connect(page: Page, tab: DatasetTab, train: TrainTab) -> None:
    """Connects the tab with the Train tab.

    A changed dataset is shown here and selected there. The settings there decide which part of each
    image is seen here.
    """
    names = ("base", "own_base", *(f"dataset.{name}" for name in dataset_scans.SETTINGS))
    fields = [train.fields[name] for name in names]
    inputs = [tab.chosen, *fields]
    outputs = [tab.chosen, tab.grid]

    def changed(event: gr.EventData, *values: Any) -> Updates:
        return [*show(event.name, _settings(values)), *choose_dataset(event.name)]

    def shown(name: str, *values: Any) -> Updates:
        return show(name, _settings(values))

    page.on_load(
        lambda: show(next(iter(datasets.names()), ""), {})[0],
        [tab.chosen],
        then={"fn": shown, "inputs": inputs, "outputs": outputs, **PRIVATE},
    )
    tab.grid.change_dataset(changed, fields, [*outputs, *train.dataset_outputs], **KEEP_LATEST)
    tab.chosen.input(shown, inputs, outputs, **KEEP_LATEST)
    tab.chosen.input(
        lambda name: choose_dataset(_existing(name)),
        tab.chosen,
        train.dataset_outputs,
        **KEEP_LATEST,
    )
    # This update contains no name. Selecting a dataset also changes the trigger word, and its event
    # must not bring back the dataset that was selected before.
    gr.on(
        [field.change for field in fields],
        lambda *values: {"settings": _settings(values)},
        fields,
        tab.grid,
        **KEEP_LATEST,
    )
    tab.grid.go_train(lambda: gr.Tabs(selected="train"), None, page.tabs, **PRIVATE)


def _settings(values: tuple[Any, ...]) -> dict[str, Any]:
    base, own_base, *rest = values
    model = own_base if base == OWN else base
    return {"base": model, **dict(zip(dataset_scans.SETTINGS, rest, strict=True))}


def _existing(name: object) -> str:
    """Returns the name of a dataset, or "" if there is none."""
    slug = run_folder.slug(str(name or ""))
    return slug if slug in datasets.names() else ""


def show(name: object, settings: dict[str, Any]) -> Updates:
    """Returns updates of the list and the view for a dataset, which may not exist yet."""
    slug = run_folder.slug(str(name)) if name else "my-dataset"
    choices = datasets.names()
    view = {
        "name": slug,
        "settings": settings,
        "examples": datasets.examples(),
        "exists": slug in choices,
        "stamp": os.urandom(4).hex(),
    }
    return [gr.Dropdown(choices if slug in choices else [slug, *choices], value=slug), view]


def add_example(data: dict[str, Any]) -> Answer:
    """Adds one of the example datasets."""
    return {"name": datasets.add_example(data.get("example")), "messages": []}


def rename_dataset(data: dict[str, Any]) -> Answer:
    """Renames a dataset."""
    return {"name": dataset_folders.rename(data.get("dataset"), data.get("to"))}


def copy_dataset(data: dict[str, Any]) -> Answer:
    """Copies a dataset under a new name."""
    return {"name": dataset_folders.duplicate(data.get("dataset"))}


def remove_dataset(data: dict[str, Any]) -> Answer:
    """Moves a dataset to the trash and returns the one to show next."""
    kept = dataset_folders.remove(data.get("dataset"))
    return {"name": next(iter(datasets.names()), ""), "kept": kept}


def restore_dataset(data: dict[str, Any]) -> Answer:
    """Restores a dataset from the trash."""
    return {"name": dataset_folders.restore(data.get("kept"))}


def caption_start(data: dict[str, Any]) -> Answer:
    """Starts captioning by a model."""
    return captioning.start(data)


def caption_stop(data: dict[str, Any]) -> Answer:
    """Stops captioning."""
    return captioning.stop(data)


def caption_status(data: dict[str, Any]) -> Answer:
    """Returns the progress of captioning."""
    return captioning.status(data)


def caption_size(data: dict[str, Any]) -> Answer:
    """Returns the size of the models that captioning would download."""
    return captioning.download_size(data)

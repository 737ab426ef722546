"""Dataset tab: pictures come in, the doctor looks at them, captions, crops and masks are edited beside them."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from app.actions import (
    captioning,
    dataset_changes,
    dataset_folders,
    dataset_view,
    datasets,
)
from app.page.html_view import drawn
from app.page.live import LATEST, QUIET, Page
from trainer.errors import DatasetError, TrainerError
from trainer.runs import run_folder

ID, TITLE = "dataset", "Dataset"
SETTINGS = (
    "resolution",
    "bucket_step",
    "max_aspect",
    "allow_upscale",
    "crop",
    "trigger",
)  # of the Train tab, that decide what is seen of a picture


def build(page: Page) -> dict[str, Any]:
    with gr.Row(elem_classes="at-toolbar"):
        chosen = gr.Dropdown(
            _names(),
            label="Dataset",
            info="Choose one, or type a new name and press Enter.",
            allow_custom_value=True,
            elem_id="dataset",
            scale=0,
            min_width=340,
        )
    served = [
        add_files,
        add_example,
        add_mask,
        rename_dataset,
        copy_dataset,
        remove_dataset,
        restore_dataset,
    ]
    served += [
        dataset_view.view,
        dataset_changes.save_caption,
        dataset_changes.preview_edit,
        dataset_changes.apply_edit,
        dataset_changes.cure,
        dataset_changes.undo,
    ]
    served += [
        dataset_changes.remove_picture,
        dataset_changes.move_crop,
        dataset_changes.save_mask,
        dataset_view.crops_overview,
    ]
    served += [caption_start, caption_stop, caption_status, caption_size]
    grid = drawn(
        "dataset",
        "picture",
        "dataset_tools",
        elem_id="dataset-view",
        server_functions=[_guarded(function) for function in served],
    )

    return {"chosen": chosen, "grid": grid}


def connect(page: Page, own: dict, others: dict[str, dict]) -> None:
    """A changed dataset is shown here and chosen in the Train tab; the settings there decide what is seen of each picture."""
    train, chosen = others["train"], own["chosen"]
    fields = [
        train["fields"][name]
        for name in ("base", "own_base", *(f"dataset.{name}" for name in SETTINGS))
    ]

    def settings(values: tuple) -> dict:
        base, own_base, *rest = values
        return {
            "base": own_base if base == "own" else base,
            **dict(zip(SETTINGS, rest, strict=True)),
        }

    def changed(event: gr.EventData, *values) -> list:
        return [*show(event.name, settings(values)), *train["choose_dataset"](event.name)]

    def shown(name: str, *values) -> list:
        return show(name, settings(values))

    page.on_load(
        lambda: show(next(iter(datasets.names()), ""), {})[0],
        [chosen],
        then={"fn": shown, "inputs": [chosen, *fields], "outputs": [chosen, own["grid"]], **QUIET},
    )
    both = [chosen, own["grid"], *train["dataset_outputs"]]
    own["grid"].change_dataset(changed, fields, both, **LATEST)
    chosen.input(shown, [chosen, *fields], [chosen, own["grid"]], **LATEST)
    chosen.input(
        lambda name: train["choose_dataset"](_known(name)),
        chosen,
        train["dataset_outputs"],
        **LATEST,
    )
    # Without a name: a dataset that is just being chosen must not be put back by the trigger word that it brings along.
    settled = {
        "fn": lambda *values: {"settings": settings(values)},
        "inputs": fields,
        "outputs": own["grid"],
        **LATEST,
    }
    gr.on([field.change for field in fields], **settled)
    own["grid"].go_train(lambda: gr.Tabs(selected="train"), None, page.tabs, **QUIET)


def _names() -> list[str]:
    return datasets.names()


def _known(name: object) -> str:
    slug = run_folder.slug(str(name or ""))
    return slug if slug in datasets.names() else ""


def show(name: object, settings: dict) -> list:
    """Updates of the list and the view for a dataset, which need not exist yet."""
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


def _guarded(
    handle: Callable[[dict], Mapping[str, object]],
) -> Callable[[dict], Mapping[str, object]]:
    """A server function whose TrainerErrors reach the browser as sentences."""

    def guarded(data):
        if not isinstance(data, dict):
            return {"error": "The request could not be understood; reload the page."}
        try:
            return handle(data)
        except TrainerError as error:
            return {"error": str(error)}
        except OSError as error:
            return {"error": f"The file could not be written or read: {error.strerror}."}

    guarded.__name__ = handle.__name__
    return guarded


def add_files(data: dict) -> dict:
    """Uploaded files become part of a dataset: {"dataset", "files": [{"path": where Gradio put it, "name": as dropped, with folders}]}.

    Uploads are deleted last: Gradio keeps files of one content and name once, so two of the list may be one upload.
    """
    dropped = []
    for file in data.get("files", []):
        upload = _upload(file.get("path"))
        dropped.append(
            (upload, str(file.get("name") or upload.name).replace("\\", "/").replace("\0", ""))
        )
    if not dropped:
        raise DatasetError("Nothing was dropped.")
    slug, findings = datasets.add(str(data.get("dataset") or ""), dropped)
    for upload, _ in dropped:
        upload.unlink(missing_ok=True)
    return {
        "name": slug,
        "messages": [
            {"file": finding.file, "level": finding.level, "text": finding.message}
            for finding in findings
        ],
    }


def _upload(path: object) -> Path:
    """A file that came through Gradio's upload route, and no other."""
    upload, uploads = Path(str(path)), Path(os.environ["GRADIO_TEMP_DIR"])
    if (
        not isinstance(path, str)
        or "\0" in path
        or not upload.is_file()
        or not upload.resolve().is_relative_to(uploads.resolve())
    ):
        raise DatasetError("A dropped file did not arrive; drop it again.")
    return upload


def add_example(data: dict) -> dict:
    return {"name": datasets.add_example(data.get("example")), "messages": []}


def add_mask(data: dict) -> Mapping[str, object]:
    """An uploaded picture becomes the mask of `file`."""
    upload = _upload(data.get("path"))
    try:
        return dataset_changes.put_mask(data, upload.read_bytes(), Path(upload.name))
    finally:
        upload.unlink(missing_ok=True)


def rename_dataset(data: dict) -> dict:
    return {"name": dataset_folders.rename(data.get("dataset"), data.get("to"))}


def copy_dataset(data: dict) -> dict:
    return {"name": dataset_folders.duplicate(data.get("dataset"))}


def remove_dataset(data: dict) -> dict:
    kept = dataset_folders.remove(data.get("dataset"))
    return {"name": next(iter(datasets.names()), ""), "kept": kept}


def restore_dataset(data: dict) -> dict:
    return {"name": dataset_folders.restore(data.get("kept"))}


def caption_start(data: dict) -> Mapping[str, object]:
    return captioning.start(data)


def caption_stop(data: dict) -> Mapping[str, object]:
    return captioning.stop(data)


def caption_status(data: dict) -> Mapping[str, object]:
    return captioning.status(data)


def caption_size(data: dict) -> Mapping[str, object]:
    return captioning.download_size(data)

"""Dataset tab: pictures come in, captions are written beside them."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import gradio as gr

from app import datasets
from app.drawn import drawn
from app.page import Page
from trainer import captions, run_folder
from trainer.errors import DatasetError, TrainerError

ID, TITLE = "dataset", "Dataset"


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
    grid = drawn(
        "dataset",
        elem_id="dataset-view",
        server_functions=[
            _guarded(add_files),
            _guarded(add_example),
            _guarded(save_caption),
            _guarded(edit_all),
            _guarded(remove_picture),
            _guarded(restore_picture),
            _guarded(refresh),
            _guarded(remove_dataset),
        ],
    )

    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    chosen.input(show, chosen, [chosen, grid], **quiet)
    page.on_load(lambda: show(next(iter(datasets.names()), "")), [chosen, grid])
    return {"chosen": chosen, "grid": grid, "quiet": quiet}


def connect(page: Page, own: dict, others: dict[str, dict]) -> None:
    """A changed dataset is shown here and chosen in the Train tab."""
    train = others["train"]

    def changed(event: gr.EventData) -> list:
        return [*show(event.name), *train["choose_dataset"](event.name)]

    both = [own["chosen"], own["grid"], *train["dataset_outputs"]]
    own["grid"].change_dataset(changed, None, both, **own["quiet"])
    own["chosen"].input(lambda name: train["choose_dataset"](_known(name)), own["chosen"], train["dataset_outputs"], **own["quiet"])
    own["grid"].go_train(lambda: gr.Tabs(selected="train"), None, page.tabs, **own["quiet"])


def _names() -> list[str]:
    return datasets.names()


def _known(name: object) -> str:
    slug = run_folder.slug(str(name or ""))
    return slug if slug in datasets.names() else ""


def show(name: object) -> list:
    """Updates of the list and the grid for a dataset, which need not exist yet."""
    slug = run_folder.slug(str(name)) if name else "my-dataset"
    view = datasets.view(slug) if slug in datasets.names() else {**datasets.view(None), "name": slug}
    choices = datasets.names()
    return [gr.Dropdown(choices if slug in choices else [slug, *choices], value=slug), view]


def _guarded(handle: Callable[[dict], dict]) -> Callable[[dict], dict]:
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
    """Uploaded files become part of a dataset: {"dataset", "files": [{"path": where Gradio put it, "name": as dropped}]}."""
    with tempfile.TemporaryDirectory(prefix="import-", dir=_uploads()) as stage:
        sources, names = [], {}
        for file in data.get("files", []):
            upload = _upload(file.get("path"))
            parts = PurePosixPath(str(file.get("name") or upload.name).replace("\\", "/").replace("\0", "")).parts
            if len(parts) > 1:
                top = _into_folder(upload, parts, Path(stage))
                sources += [top] if top not in sources else []
            else:
                sources.append(upload)
                names[upload] = parts[0] if parts else upload.name
        if not sources:
            raise DatasetError("Nothing was dropped.")
        slug, findings = datasets.add(str(data.get("dataset") or ""), sources, names)
    for upload in names:
        upload.unlink(missing_ok=True)
    return {"name": slug, "messages": [{"file": finding.file, "level": finding.level, "text": finding.message} for finding in findings]}


def _uploads() -> Path:
    return Path(os.environ["GRADIO_TEMP_DIR"])


def _upload(path: object) -> Path:
    """A file that came through Gradio's upload route, and no other."""
    upload = Path(str(path))
    if not isinstance(path, str) or "\0" in path or not upload.is_file() or not upload.resolve().is_relative_to(_uploads().resolve()):
        raise DatasetError("A dropped file did not arrive; drop it again.")
    return upload


def _into_folder(upload: Path, parts: tuple[str, ...], stage: Path) -> Path:
    """Puts a file of a dropped folder back into that folder, so that captions find their pictures. Returns the top folder."""
    folder = stage.joinpath(*[run_folder.slug(part) for part in parts[:-1]][:8])
    folder.mkdir(parents=True, exist_ok=True)
    stem, suffix = os.path.splitext(parts[-1])
    shutil.move(upload, folder / (stem.encode("utf-8", "replace")[:100].decode("utf-8", "ignore") + suffix[:12]))
    return stage / folder.relative_to(stage).parts[0]


def add_example(data: dict) -> dict:
    return {"name": datasets.add_example(data.get("example")), "messages": []}


def save_caption(data: dict) -> dict:
    picture = datasets.resolve_picture(data.get("dataset"), data.get("file"))
    captions.write_caption(picture, str(data.get("caption", "")))
    return {"caption": captions.read_caption(picture)[0]}


def edit_all(data: dict) -> dict:
    """Find and replace, and a text in front of every caption that does not begin with it."""
    name = data.get("dataset")
    find, replacement, front = (str(data.get(key, "")) for key in ("find", "replace", "front"))
    changed = 0
    for item in datasets.scan(datasets.resolve(name).name)[0]:
        before = captions.read_caption(item.path)[0]
        after = before.replace(find, replacement) if find else before
        if front.strip() and not after.startswith(front.strip()):
            after = f"{front.strip()} {after}".strip()
        if after != before:
            captions.write_caption(item.path, after)
            changed += 1
    return {"name": name, "changed": changed}


def remove_picture(data: dict) -> dict:
    datasets.remove_picture(data.get("dataset"), data.get("file"))
    return {"ok": True}


def restore_picture(data: dict) -> dict:
    datasets.restore_picture(data.get("dataset"), data.get("file"))
    return {"name": data["dataset"]}


def refresh(data: dict) -> dict:
    return datasets.summary(data.get("dataset"))


def remove_dataset(data: dict) -> dict:
    datasets.remove(data.get("dataset"))
    return {"name": next(iter(datasets.names()), "")}

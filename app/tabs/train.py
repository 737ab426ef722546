"""Train tab: a recipe, a few basic knobs, everything else under Advanced; on the right, the run."""

from pathlib import Path
from typing import Any

import gradio as gr

from app import datasets, form, runs, views
from app.drawn import drawn
from app.page import Page
from trainer import base_model, config, estimate, presets
from trainer.config import EMBEDDED, RunConfig
from trainer.errors import TrainerError

ID, TITLE = "train", "Train"
OWN = "own"
SD15, SDXL = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"
BASE_TITLES = {EMBEDDED: "Built-in, small", SD15: "Stable Diffusion 1.5", SDXL: "Stable Diffusion XL"}
BASIC = ("name", "dataset.folder", "dataset.trigger", "sampling.prompts")  # beside the base and the recipe, which have widgets of their own
HIDDEN = ("preset", "base.model")
SECTION_TITLES = {
    "base": "Base model",
    "dataset": "Pictures",
    "adapter": "Adapter",
    "training": "Training",
    "objective": "Objective",
    "sampling": "Samples while training",
    "saving": "Saving",
}
QUIET = {"show_progress": "hidden", "api_visibility": "private"}
FEW_PICTURES = 5


def advanced_paths() -> list[str]:
    return [path for path in form.all_fields() if path not in BASIC + HIDDEN]


def build(page: Page) -> dict[str, Any]:
    with gr.Row(elem_classes="at-columns"):
        with gr.Column(scale=2, min_width=330):
            fields = _settings_form()
            line = drawn("estimate", elem_id="estimate")
            start = gr.Button("Start training", variant="primary", size="lg", elem_id="start-training")
            fields |= _advanced_form()
        with gr.Column(scale=3, min_width=330):
            progress = drawn("progress", elem_id="progress", server_functions=[act, read_log])
            curve = drawn("curve", elem_id="curve")
            samples = drawn("samples", elem_id="samples")
    page.follow(progress, lambda: views.progress(page.device))
    page.follow(curve, views.curve)
    page.follow(samples, views.samples)
    own = {"fields": fields, "line": line, "start": start, "progress": progress, "outputs": list(fields.values())}
    own["choose_dataset"], own["show_settings"] = choose_dataset, show_settings
    own["dataset_outputs"] = [fields["dataset.folder"], fields["name"], fields["dataset.trigger"]]
    _wire(page, own)
    return own


def _settings_form() -> dict[str, gr.components.Component]:
    """The widgets seen at first; "base" and "own_base" stand for base.model."""
    fields: dict[str, Any] = {}
    first = next(iter(presets.load_presets().values()))
    with gr.Group(elem_classes="at-form"):
        with gr.Row():
            fields["dataset.folder"] = gr.Dropdown(
                datasets.names(),
                label="Dataset",
                info="The pictures to learn from.",
                elem_id="field-dataset-folder",
                filterable=False,
                min_width=150,
            )
            fields["name"] = form.widget("name", max_lines=1, min_width=150)
        fields["base"] = gr.Radio(
            _base_choices(), value=first.config.base.model, label="Base model", info="What the adapter is trained on.", elem_id="field-base"
        )
        fields["own_base"] = form.widget("base.model", value="", visible=False, label="Folder or Hugging Face id", max_lines=1)
        fields["preset"] = gr.Radio(
            _recipe_choices(recipes(first.config.base.model)),
            value=first.name,
            label="Purpose",
            elem_id="field-preset",
            elem_classes="at-cards",
        )
        fields["dataset.trigger"] = form.widget("dataset.trigger", label="Trigger word", max_lines=1)
        fields["sampling.prompts"] = form.widget(
            "sampling.prompts", label="Sample prompts", placeholder="The trigger word and the caption of the first picture"
        )
    return fields


def _advanced_form() -> dict[str, gr.components.Component]:
    """Every other field of RunConfig, a closed section each, in the order of declaration."""
    fields, recipe = {}, next(iter(presets.load_presets().values())).config
    with gr.Accordion("Advanced", open=False, elem_id="advanced"):
        for section in dict.fromkeys(path.partition(".")[0] for path in advanced_paths()):
            with gr.Accordion(SECTION_TITLES[section], open=False, elem_id=f"section-{section}"), gr.Row(elem_classes="at-section"):
                for path in advanced_paths():
                    if path.startswith(f"{section}."):
                        fields[path] = form.widget(path, value=form.to_widget(config.get(recipe, path)), min_width=180)
    return fields


def _base_choices() -> list[tuple[str, str]]:
    bases = dict.fromkeys(preset.config.base.model for preset in presets.load_presets().values())
    return [*((BASE_TITLES.get(base, base), base) for base in bases), ("My own…", OWN)]


def recipes(base: str, own_base: str = "") -> list[presets.Preset]:
    """The presets for a base; for a model of one's own those of its kind."""
    base = _kind_of(own_base) if base == OWN else base
    return [preset for preset in presets.load_presets().values() if preset.config.base.model == base]


def _kind_of(own_base: str) -> str:
    """The base whose recipes suit a model of one's own: told by the model where it is on this machine, else by its name."""
    try:
        folder = base_model.locate(config.Base(model=own_base)) if own_base else None
        is_xl = base_model.inspect(folder).pipeline == "StableDiffusionXLPipeline" if folder else "xl" in own_base.lower()
    except TrainerError:  # told at the start of a run, with the reason
        is_xl = False
    return SDXL if is_xl else SD15


def _recipe_choices(choices: list[presets.Preset]) -> list[tuple[str, str]]:
    return [(f"{preset.title}\n{preset.purpose} {preset.pictures} pictures, {preset.time}.", preset.name) for preset in choices]


def _wire(page: Page, own: dict) -> None:
    fields, line = own["fields"], own["line"]
    names, inputs = list(fields), list(fields.values())

    def estimated(*values) -> dict:
        return summary(dict(zip(names, values, strict=True)))

    def started(*values) -> dict:
        return start(dict(zip(names, values, strict=True)))

    line_update = {"fn": estimated, "inputs": inputs, "outputs": line, **QUIET}
    own["line_update"] = line_update
    gr.on([field.input for name, field in fields.items() if name not in ("base", "preset")], trigger_mode="always_last", **line_update)
    gr.on(
        [fields["base"].input, fields["own_base"].blur],
        choose_base,
        [fields["base"], fields["preset"], fields["own_base"]],
        [fields["own_base"], fields["preset"], *_recipe_widgets(fields)],
        **QUIET,
    ).then(**line_update)
    fields["preset"].input(choose_recipe, fields["preset"], _recipe_widgets(fields), **QUIET).then(**line_update)
    fields["dataset.folder"].input(choose_dataset, fields["dataset.folder"], own["dataset_outputs"], **QUIET).then(**line_update)
    own["start"].click(started, inputs, line, **QUIET)
    page.on_load(lambda: choose_dataset(next(iter(datasets.names()), "")), own["dataset_outputs"], then=line_update)
    page.follow(fields["dataset.folder"], datasets.names, lambda names: gr.Dropdown(names))


def connect(page: Page, own: dict, others: dict[str, dict]) -> None:
    preview = others["preview"]

    def open_preview(event: gr.EventData) -> list:
        return [gr.Tabs(selected="preview"), *preview["choose_run"](event.run)]

    own["progress"].open_preview(open_preview, None, [page.tabs, *preview["run_outputs"]], **QUIET)
    own["fields"]["dataset.folder"].change(**own["line_update"])


def _recipe_widgets(fields: dict) -> list:
    return [fields[path] for path in advanced_paths()]


def choose_base(base: str, preset: str, own_base: str) -> list:
    """The recipes for a base: the one with the same title stays chosen."""
    choices = recipes(base, own_base)
    title = presets.load_presets()[preset].title if preset in presets.load_presets() else ""
    chosen = next((recipe for recipe in choices if recipe.title == title), choices[0])
    return [gr.Textbox(visible=base == OWN), gr.Radio(_recipe_choices(choices), value=chosen.name), *choose_recipe(chosen.name)]


def choose_recipe(name: str) -> list:
    return form.write(advanced_paths(), presets.load_preset(name).config)


def choose_dataset(name: str) -> list:
    """The dataset, its name for the adapter, and the trigger word that its captions begin with."""
    if name not in datasets.names():
        return [gr.Dropdown(datasets.names(), value=None), gr.skip(), gr.skip()]
    try:
        trigger = datasets.suggest_trigger(datasets.scan(name)[0])
    except TrainerError:
        trigger = ""
    return [gr.Dropdown(datasets.names(), value=name), name, trigger]


def show_settings(run: RunConfig) -> list:
    """Updates of all fields that bring back the settings of an earlier run."""
    base = run.base.model if run.base.model in dict.fromkeys(value for _, value in _base_choices()) else OWN
    known = presets.load_presets()
    folder = Path(run.dataset.folder)
    dataset = folder.name if folder.parent == datasets.root() and folder.name in datasets.names() else None
    values = {
        "base": base,
        "own_base": gr.Textbox(value=run.base.model if base == OWN else "", visible=base == OWN),
        "preset": gr.Radio(_recipe_choices(recipes(base, run.base.model)), value=run.preset if run.preset in known else None),
        "dataset.folder": gr.Dropdown(datasets.names(), value=dataset),
    }
    paths = [*BASIC, *advanced_paths()]
    shown = dict(zip(paths, form.write(paths, run), strict=True)) | values
    return [shown[name] for name in _field_names()]


def _field_names() -> list[str]:
    return ["dataset.folder", "name", "base", "own_base", "preset", "dataset.trigger", "sampling.prompts", *advanced_paths()]


def _by_path(values: dict[str, Any]) -> dict[str, Any]:
    """Widget values as RunConfig paths."""
    by_path = {path: value for path, value in values.items() if path not in ("base", "own_base")}
    by_path["base.model"] = values["own_base"] if values["base"] == OWN else values["base"]
    by_path["preset"] = values["preset"] or ""
    by_path["dataset.folder"] = str(datasets.root() / values["dataset.folder"]) if values["dataset.folder"] in datasets.names() else ""
    return by_path


def summary(values: dict[str, Any]) -> dict:
    """The live line: steps, time, parameters and size before anything starts; or what stands in the way."""
    if values["base"] == OWN and not (values["own_base"] or "").strip():
        return {"hint": "Give the folder of your base model, or its Hugging Face id."}
    wrong = form.faults(_by_path(values))
    if wrong:
        return {"faults": [f"{form.label(path)}: {text}" if path else text for path, text in wrong.items()]}
    run = form.read(_by_path(values))
    if not run.dataset.folder:
        return {"hint": "Add pictures on the Dataset tab first, or try one of its examples."}
    try:
        items, findings = datasets.scan(values["dataset.folder"], run.dataset.resolution)
        return _estimate(run, len(items), sum(item.repeats for item in items)) | {"notes": _notes(run, items, findings)}
    except TrainerError as error:
        return {"faults": [str(error)]}


def _estimate(run: RunConfig, pictures: int, views_per_pass: int) -> dict:
    training = run.training
    steps = estimate.steps_for(run, views_per_pass)
    batch = training.batch_size * training.gradient_accumulation_steps
    views_text = "" if training.steps else f" × {training.views_per_picture} views"
    seconds = estimate.measured_seconds_per_step(run, runs.all_runs()[:20])
    parameters = estimate.trainable_parameters(run)
    held_out = estimate.held_out_count(run, pictures)
    facts = [f"about {views.duration(seconds * steps)}" if seconds else "the time is known after the first steps"]
    if parameters is None:
        facts.append("the base model is downloaded first")
    else:
        facts.append(f"{views.count(parameters)} parameters, {views.size(estimate.file_bytes(run))} file")
    return {
        "sum": f"{pictures - held_out} pictures{views_text}, batch {batch} = ",
        "steps": f"{steps} steps",
        "facts": facts,
        "held_out": f"{held_out} more held out for measuring" if held_out else "",
    }


def _notes(run: RunConfig, items: list, findings: list) -> list[str]:
    """What deserves a second look before the start; nothing here forbids it."""
    notes = []
    if len(items) < FEW_PICTURES:
        notes.append(f"Only {len(items)} picture{'' if len(items) == 1 else 's'}: ten or more varied ones give a far better result.")
    bare = sum(not item.caption.strip() for item in items)
    if bare:
        notes.append(f"{bare} of {len(items)} pictures have no caption.")
    left_out = sum(finding.level == "error" for finding in findings)
    if left_out:
        notes.append(f"{left_out} files cannot be used and are left out; the Dataset tab says why.")
    return notes


def start(values: dict[str, Any]) -> dict:
    """Puts the run into the queue. What stands in the way is said, and every field stays as it is."""
    view = summary(values)
    if "steps" not in view:
        return {"faults": view.get("faults") or [view["hint"]]}
    busy = runs.active() is not None
    try:
        runs.start(form.read(_by_path(values)))
    except TrainerError as error:
        return {"faults": [str(error)]}
    return view | {"started": "It waits in the queue until the present run ends." if busy else ""}


def act(data: dict) -> dict:
    """A button of the status card or of the queue."""
    try:
        runs.act(data.get("run"), data.get("action"))
    except TrainerError as error:
        return {"error": str(error)}
    return {"ok": True}


def read_log(data: dict) -> dict:
    try:
        return {"text": runs.read_log(data.get("run"))}
    except TrainerError as error:
        return {"error": str(error)}

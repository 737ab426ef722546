"""What the buttons of the Train tab do: check, start, save presets, import and export settings."""

import json
from pathlib import Path
from typing import Any

import gradio as gr

from app.actions import adapter_tools, datasets, preflight
from app.actions.records import Check, PreflightView
from app.jobs import run_actions, runs
from app.page.html_view import Answer
from app.settings import form, own_presets
from app.tabs.train_form import (
    BASIC,
    OWN,
    FormValues,
    Updates,
    advanced_paths,
    field_names,
    preset_choices,
    presets_for,
    read_form,
    settings_by_path,
    show_settings,
    updates_for,
)
from trainer import config
from trainer.config import RunConfig, interop
from trainer.errors import ConfigError, TrainerError
from trainer.runs import run_folder


def summary(values: FormValues) -> PreflightView:
    """Returns the line above the button: steps, time, memory, and checks with their fixes."""
    if values["base"] == OWN and not (values["own_base"] or "").strip():
        text = "Enter the .safetensors file, the folder or the Hugging Face id of your base model."
        return {"checks": [preflight.check("bad", text)]}
    errors = form.errors(settings_by_path(values))
    if errors:
        return {"checks": [_error_check(path, text) for path, text in errors.items()]}
    preset = own_presets.all_presets().get(values["preset"])
    return preflight.view(read_form(values), values["dataset.folder"], preset)


def _error_check(path: str, text: str) -> Check:
    """Returns the check for an invalid value, with a fix that resets it."""
    if not path:  # several settings contradict each other, so all of them are reset
        return preflight.check(
            "bad", text, {"label": "Back to the preset", "reset": advanced_paths()}
        )
    message = f"{form.label(path)}: {text}"
    if path in BASIC:
        return preflight.check("bad", message)
    return preflight.check("bad", message, {"label": "Reset it", "reset": [path]})


def changes(values: FormValues) -> dict[str, object]:
    """Returns the settings that differ from the preset, for the tools above the settings."""
    preset = own_presets.all_presets().get(values["preset"])
    is_own = values["preset"] in own_presets.own()
    if preset is None or form.errors(settings_by_path(values)):
        return {"changed": [], "own": is_own}
    changed = form.differences(read_form(values), preset.config, advanced_paths())
    return {"changed": changed, "own": is_own}


def reset(event: gr.EventData, preset_name: str) -> Updates:
    """Returns updates that give some settings the values of the preset."""
    preset = own_presets.all_presets().get(preset_name)
    source = preset.config if preset else RunConfig()
    paths = [path for path in event.paths if path in advanced_paths()]
    return updates_for(dict(zip(paths, form.widget_values(paths, source), strict=True)))


def save_preset(title: object, values: FormValues) -> Updates:
    """Saves the form as your own preset and selects it. Updates "preset" and the tools."""
    try:
        name = own_presets.save(str(title or ""), read_form(values))
    except TrainerError as error:
        return [gr.skip(), {"problem": str(error)}]
    choices = preset_choices(presets_for(values["base"], values["own_base"] or ""))
    message = f"Saved: {own_presets.own()[name].title}."
    return [gr.Radio(choices, value=name), {"changed": [], "own": True, "said": message}]


def remove_preset(values: FormValues) -> Updates:
    """Removes your own preset and selects the first one. Updates "preset" and the tools."""
    try:
        own_presets.remove(values["preset"])
    except TrainerError as error:
        return [gr.skip(), {"problem": str(error)}]
    left = presets_for(values["base"], values["own_base"] or "")
    return [
        gr.Radio(preset_choices(left), value=left[0].name),
        {"said": "The preset was removed. The settings stay as they are."},
    ]


def export(values: FormValues) -> dict[str, object]:
    """Returns the form as the text of a run.toml."""
    try:
        run = read_form(values)
    except TrainerError as error:
        return {"problem": str(error)}
    return {"download": {"name": f"{run_folder.slug(run.name)}.toml", "text": config.to_toml(run)}}


def take_settings(text: object, values: FormValues) -> Updates:
    """Fills the form from a run.toml, a preset, or the settings of another trainer.

    The selected dataset stays unless the settings name another one of this page. Updates the tools
    and all fields.
    """
    try:
        run, message = read_settings(str(text or ""), values)
    except TrainerError as error:
        return [{"problem": str(error)}, *[gr.skip()] * len(field_names())]
    shown = show_settings(run)
    if datasets.root() not in Path(run.dataset.folder).parents:
        shown[field_names().index("dataset.folder")] = gr.skip()
    return [{"said": message}, *shown]


def read_metadata(text: str) -> RunConfig | None:
    """Returns the settings in the metadata of an adapter from this program, or None."""
    try:
        data = json.loads(text)
        if "atelier_config" not in data:
            return None
        return config.from_dict(json.loads(data["atelier_config"]), "settings in the file")
    except (ValueError, TypeError, KeyError):
        return None


def read_settings(text: str, values: FormValues) -> tuple[RunConfig, str]:
    """Reads settings of this program, or of another trainer as changes to the form.

    Returns the settings and a message. Raises ConfigError if the text contains neither.
    """
    if (run := read_metadata(text)) is not None:
        return run, (
            "These are the settings that the adapter was trained with. Choose its images to train "
            "it again."
        )
    try:
        return config.parse(text), "The settings of the file are loaded."
    except ConfigError as own_error:
        try:
            foreign = interop.read(text)
        except ConfigError as error:
            is_ours = "cannot be used" in str(own_error) and "[training]" in text
            raise (own_error if is_ours else error) from None
    run, left_out = interop.apply(foreign, read_form(values))
    message = f"Taken from {foreign.program}: {len(foreign.changes)} settings."
    if left_out:
        rows = "\n".join(f"· {setting}" for setting in left_out)
        message += f"\nLeft out, because there is no counterpart:\n{rows}"
    return config.replace(run, {"preset": ""}), message


def start(values: FormValues) -> PreflightView:
    """Puts the run into the queue. If a check fails, reports it and changes nothing."""
    view = summary(values)
    if "steps" not in view or any(check["level"] == "bad" for check in view["checks"]):
        return view | {"refused": "The training cannot start yet:"}
    is_busy = runs.active() is not None
    try:
        run_actions.start(read_form(values))
    except TrainerError as error:
        return view | {"refused": str(error)}
    return view | {"started": "It is queued until the current run ends." if is_busy else ""}


def act(data: dict[str, Any]) -> Answer:
    """Presses a button of the status card or of the queue."""
    run_actions.act(data.get("run"), data.get("action"))
    return {"ok": True}


def read_log(data: dict[str, Any]) -> Answer:
    """Returns the end of a run's log."""
    return {"text": runs.read_log(runs.resolve(data.get("run")))}


def shrink(data: dict[str, Any]) -> Answer:
    """Starts to make a file with a smaller rank."""
    return {"job": adapter_tools.shrink(data.get("run"), data.get("rank"))}


def shrunk(data: dict[str, Any]) -> Answer:
    """Returns the progress of `shrink`."""
    return adapter_tools.state(data.get("job"))

"""Preview tab: the adapter beside its base model at any strength, and grids of images."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from app.jobs import previews, runs
from app.page.html_view import html_view
from app.page.live import KEEP_LATEST, PRIVATE, Page
from app.settings import form
from app.tabs import preview_plans as plans
from app.tabs.preview_plans import MORE, SAMPLING, Planner, PreviewValues
from app.tabs.train_form import Updates
from trainer.errors import TrainerError
from trainer.runs.run_status import RunStatus

ID, TITLE = "preview", "Preview"
FROM_RUN = ("run", "save", "prompt", "seed", *SAMPLING)
"""The fields that selecting a run fills."""
STACK = tuple(f"{name}{part}" for name in MORE for part in ("", "_strength", "_text_strength"))
NAMES = (*FROM_RUN, "strength", "text_strength", "width", "height", "base", *STACK, "sheet_prompts")
"""All fields, in the order in which events receive them."""


@dataclass(frozen=True)
class PreviewTab:
    """The parts of the tab that events use."""

    fields: dict[str, Any]
    """The widgets by name."""
    images: gr.HTML

    @property
    def run_outputs(self) -> list[Any]:
        """The outputs of `choose_run`."""
        return [self.fields[name] for name in FROM_RUN]


def build(page: Page) -> PreviewTab:
    """Builds the tab and the events inside it."""
    with gr.Row(elem_classes="at-columns"):
        with gr.Column(scale=2, min_width=330, visible=False) as controls:
            fields, new_seed = _controls()
            compare = gr.Button(
                "Compare with the base", variant="primary", size="lg", elem_id="compare"
            )
            with gr.Row():
                strengths = gr.Button("Strength grid", elem_id="grid-strengths")
                saves = gr.Button("Saves grid", elem_id="grid-saves")
            advanced, sheet, earlier = _advanced()
        with gr.Column(scale=3, min_width=330):
            images = html_view(
                "preview", elem_id="preview-view", events=("go_train", "stop_drawing")
            )
    tab = PreviewTab(fields | advanced, images)
    new_seed.click(lambda: random.randrange(2**31), None, tab.fields["seed"], **PRIVATE)
    earlier.input(lambda text: text, earlier, tab.fields["prompt"], **KEEP_LATEST)
    # Without an adapter all controls would be dead.
    page.follow(controls, lambda: bool(plans.run_choices()), lambda some: gr.Column(visible=some))
    page.follow(images, lambda: {"is_empty": not plans.run_choices()})
    page.follow(earlier, previews.prompts, lambda texts: gr.Dropdown(texts))
    _follow_runs(page, tab)
    buttons: dict[gr.Button, Planner] = {
        compare: plans.plan_compare,
        strengths: plans.plan_strengths,
        saves: plans.plan_saves,
        sheet: plans.plan_sheet,
    }
    _wire_drawing(page, tab, buttons)
    return tab


def connect(page: Page, tab: PreviewTab) -> None:
    """Connects the button that opens the Train tab."""
    tab.images.go_train(lambda: gr.Tabs(selected="train"), None, page.tabs, **PRIVATE)


def _follow_runs(page: Page, tab: PreviewTab) -> None:
    """Keeps the lists of runs, saves and further adapters up to date."""
    fields = tab.fields
    fields["run"].change(choose_run, fields["run"], tab.run_outputs, **PRIVATE)
    page.on_load(lambda: choose_run(None), tab.run_outputs)
    page.follow(fields["run"], plans.run_choices, _show_runs)
    newest, newest_before = gr.State([]), gr.State([])
    page.follow(newest, plans.file_choices)
    newest.change(
        show_saves,
        [fields["run"], fields["save"], newest, newest_before],
        [fields["save"], newest_before],
        **PRIVATE,
    )
    for name in MORE:
        page.follow(
            fields[name],
            plans.file_choices,
            lambda choices: gr.Dropdown([("None", ""), *choices]),
        )


def _controls() -> tuple[dict[str, Any], gr.Button]:
    """Builds the fields in sight and the button for a new seed."""
    fields: dict[str, Any] = {}
    with gr.Group(elem_classes="at-form"):
        fields["run"] = gr.Dropdown(
            plans.run_choices(), label="Adapter", elem_id="preview-run", filterable=False
        )
        fields["save"] = gr.Dropdown(
            [],
            label="Save",
            info="Each save of the run. ★ has the best validation loss.",
            elem_id="preview-save",
            filterable=False,
        )
        fields["prompt"] = gr.Textbox(label="Prompt", lines=2, elem_id="preview-prompt")
        fields["strength"] = gr.Slider(
            0,
            2,
            1,
            step=0.05,
            label="Strength",
            info="0 is the base model, 1 the adapter as trained. Moving the slider draws again.",
            elem_id="preview-strength",
            buttons=[],
        )
    with gr.Row(elem_classes="at-seed"):
        fields["seed"] = gr.Number(
            1, label="Seed", precision=0, elem_id="preview-seed", min_width=120
        )
        new_seed = gr.Button("New seed", size="md", elem_id="new-seed", min_width=100)
    return fields, new_seed


def _advanced() -> tuple[dict[str, Any], gr.Button, gr.Dropdown]:
    """Builds the other fields, the button for the sheet and the list of earlier prompts."""
    fields: dict[str, Any] = {}
    with gr.Accordion("Advanced", open=False, elem_id="preview-advanced"):
        earlier = gr.Dropdown(
            previews.prompts(), value=None, label="Earlier prompts", elem_id="preview-earlier"
        )
        for name in SAMPLING:
            fields[name] = form.widget(f"sampling.{name}", elem_id=f"preview-{name}")
        with gr.Row():
            for name in ("width", "height"):
                fields[name] = _number(
                    name.capitalize(),
                    f"preview-{name}",
                    0,
                    info="0: the base model's size.",
                    precision=0,
                    step=8,
                )
        fields["base"] = gr.Textbox(
            "",
            label="Another base model",
            info="Folder, file or Hugging Face id of a model of the same family. "
            "Empty: the one it was trained on.",
            max_lines=1,
        )
        fields["text_strength"] = _text_strength("Strength in the text encoder")
        for name in MORE:
            with gr.Row():
                fields[name] = gr.Dropdown(
                    [("None", "")],
                    value="",
                    label=f"{name.capitalize()} adapter",
                    elem_id=f"preview-{name}",
                    filterable=False,
                )
                fields[f"{name}_strength"] = _number(
                    "Its strength", f"preview-{name}-strength", 1.0
                )
                fields[f"{name}_text_strength"] = _text_strength("In the text encoder")
        fields["sheet_prompts"] = gr.Textbox(
            "",
            label="Prompts of the sheet",
            info="One per line, each drawn for every save at three strengths. "
            "Empty: the prompt above.",
            lines=2,
            elem_id="preview-sheet-prompts",
        )
        sheet = gr.Button("Draw the sheet", elem_id="sheet")
    return fields, sheet, earlier


def _number(label: str, elem_id: str | None, value: float | None, **options: Any) -> gr.Number:
    return gr.Number(value, label=label, elem_id=elem_id, min_width=120, **{"step": 0.05} | options)


def _text_strength(label: str) -> gr.Textbox:
    """Returns a text box for an optional number.

    An empty number field would show 0, which would switch the adapter off in the text encoder.
    """
    return gr.Textbox("", label=label, info="Empty: the same.", max_lines=1, min_width=120)


def _wire_drawing(page: Page, tab: PreviewTab, buttons: dict[gr.Button, Planner]) -> None:
    fields, images = tab.fields, tab.images
    options = {
        "inputs": [fields[name] for name in NAMES],
        "outputs": images,
        "concurrency_id": "preview",
        "concurrency_limit": 1,
        **PRIVATE,
    }

    def drawer(planner: Planner) -> Any:
        def draw(*values: Any) -> Iterator[dict[str, Any]]:
            yield from draw_all(page, planner, dict(zip(NAMES, values, strict=True)))

        return draw

    compare = drawer(plans.plan_compare)
    events = [
        fields["prompt"].submit(compare, **options),
        # `release` does not fire for the keyboard. `input` does, and the last position wins.
        fields["strength"].input(compare, trigger_mode="always_last", **options),
        *[button.click(drawer(planner), **options) for button, planner in buttons.items()],
    ]
    images.stop_drawing(lambda: {"note": "Stopped."}, None, images, cancels=events, **PRIVATE)


def _show_runs(choices: list[tuple[str, str]]) -> gr.Dropdown:
    """Returns an update of the list of runs. The first adapter is selected at once."""
    return gr.Dropdown(choices, value=choices[0][1]) if len(choices) == 1 else gr.Dropdown(choices)


def show_saves(
    run_id: str | None,
    save: str | None,
    newest: list[tuple[str, str]],
    newest_before: list[tuple[str, str]],
) -> Updates:
    """Returns an update of the list of saves, and what is newest now.

    If the newest save was selected, the next one becomes selected. Any other choice stays.
    """
    if run_id not in [value for _, value in plans.run_choices()]:
        return [gr.skip(), newest]
    choices = plans.save_choices(runs.resolve(run_id))
    was_newest = f"{run_id}/{save}" in [value for _, value in newest_before]
    is_gone = save not in [file for _, file in choices]
    value = choices[0][1] if choices and (was_newest or is_gone) else save
    return [gr.Dropdown(choices, value=value), newest]


def choose_run(run_id: str | None) -> Updates:
    """Returns updates of the fields in FROM_RUN for a run, or for the newest one."""
    choices = plans.run_choices()
    known = [value for _, value in choices]
    if not known:
        empty = gr.Dropdown([], value=None)
        return [empty, empty, *[gr.skip()] * (len(FROM_RUN) - 2)]
    chosen = run_id if run_id in known else known[0]
    folder = runs.resolve(chosen)
    saves = plans.save_choices(folder)
    prompt, seed = _first_sample(folder, runs.status(folder))
    sampling = form.widget_values([f"sampling.{name}" for name in SAMPLING], runs.settings(folder))
    return [
        gr.Dropdown(choices, value=chosen),
        gr.Dropdown(saves, value=saves[0][1] if saves else None),
        prompt,
        seed,
        *sampling,
    ]


def _first_sample(folder: Path, current: RunStatus) -> tuple[str, int]:
    """Returns prompt and seed of the run's first sample, so the first preview looks familiar."""
    if current.samples:
        return current.samples[0].prompt, current.samples[0].seed
    run = runs.settings(folder)
    return next(iter(run.sampling.prompts), run.dataset.trigger), run.sampling.seed


def draw_all(page: Page, planner: Planner, values: PreviewValues) -> Iterator[dict[str, Any]]:
    """Draws the images of a plan and yields the view after each one."""
    try:
        if not values["run"]:
            raise TrainerError("There are no adapters yet. Train one first.")
        previews.check_free()
        plans.check(values)
        plan = planner(values)
        last_request = plan[-1][1]
        previews.keep_prompt(last_request.prompt)
        images = [{"title": title, "src": "", "prompt": req.prompt} for title, req in plan]
        for number, (_, request) in enumerate(plan):
            doing = "Drawing"
            if not page.engine.is_running:
                doing = "Loading the model; the first image takes longer"
            yield {"pictures": images, "busy": f"{doing} ({number + 1} of {len(plan)})"}
            file = page.engine.draw(request)
            # A new list: the view that was yielded before must not change.
            images = list(images)
            images[number] = images[number] | {"src": f"/previewfile/{file.name}"}
        yield {"pictures": images, "elsewhere": plans.other_programs(last_request)}
    except TrainerError as error:
        yield {"error": str(error)}

"""Preview tab: the adapter beside its base at any strength, and grids over strengths and saves."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from app.jobs import previews, runs
from app.jobs.ttl_cache import ttl_cached
from app.page.html_view import drawn
from app.page.live import LATEST, QUIET, Page
from app.settings import form
from app.views import labels
from trainer.errors import TrainerError
from trainer.inference.request import SampleRequest, StackedAdapter
from trainer.runs import run_folder
from trainer.runs.run_status import RunStatus

ID, TITLE = "preview", "Preview"
STRENGTHS = (0.0, 0.4, 0.7, 1.0, 1.3)
SAMPLING = ("negative_prompt", "inference_steps", "guidance_scale", "sampler")
FROM_RUN = ("run", "save", "prompt", "seed", *SAMPLING)  # what choosing a run fills
MORE = ("second", "third")  # further adapters on top of the first
STACK = tuple(f"{name}{part}" for name in MORE for part in ("", "_strength", "_text_strength"))
NAMES = (*FROM_RUN, "strength", "text_strength", "width", "height", "base", *STACK, "sheet_prompts")
SHEET_STRENGTHS = (0.5, 0.75, 1.0)
MAX_IMAGES = 60


def build(page: Page) -> dict[str, Any]:
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
            fields |= advanced
        with gr.Column(scale=3, min_width=330):
            pictures = drawn("preview", elem_id="preview-view")
    own = {
        "fields": fields,
        "pictures": pictures,
        "run_outputs": [fields[name] for name in FROM_RUN],
        "choose_run": choose_run,
    }
    fields["run"].change(choose_run, fields["run"], own["run_outputs"], **QUIET)
    new_seed.click(lambda: random.randrange(2**31), None, fields["seed"], **QUIET)
    page.on_load(lambda: choose_run(None), own["run_outputs"])
    page.follow(fields["run"], _run_choices, _show_runs)
    newest, newest_before = gr.State([]), gr.State([])
    page.follow(newest, _file_choices)
    newest.change(
        show_saves,
        [fields["run"], fields["save"], newest, newest_before],
        [fields["save"], newest_before],
        **QUIET,
    )
    # Without an adapter every control here would be a dead one.
    page.follow(controls, lambda: bool(_run_choices()), lambda some: gr.Column(visible=some))
    page.follow(pictures, lambda: {"is_empty": not _run_choices()})
    page.follow(earlier, previews.prompts, lambda texts: gr.Dropdown(texts))
    earlier.input(lambda text: text, earlier, fields["prompt"], **LATEST)
    for name in MORE:
        page.follow(
            fields[name], _file_choices, lambda choices: gr.Dropdown([("None", ""), *choices])
        )
    _wire_drawing(
        page,
        own,
        {compare: plan_compare, strengths: plan_strengths, saves: plan_saves, sheet: plan_sheet},
    )
    return own


def _controls() -> tuple[dict[str, gr.components.Component], gr.Button]:
    fields: dict[str, Any] = {}
    with gr.Group(elem_classes="at-form"):
        fields["run"] = gr.Dropdown(
            _run_choices(), label="Adapter", elem_id="preview-run", filterable=False
        )
        fields["save"] = gr.Dropdown(
            [],
            label="Save",
            info="Each save of the run. ★ is the best on the held-out pictures.",
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
            info="0 is the base, 1 the adapter as trained. Moving it draws again.",
            elem_id="preview-strength",
            buttons=[],
        )
    with gr.Row(elem_classes="at-seed"):
        fields["seed"] = gr.Number(
            1, label="Seed", precision=0, elem_id="preview-seed", min_width=120
        )
        new_seed = gr.Button("New seed", size="md", elem_id="new-seed", min_width=100)
    return fields, new_seed


def _advanced() -> tuple[dict[str, gr.components.Component], gr.Button, gr.Dropdown]:
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
                    info="0: the base's own size.",
                    precision=0,
                    step=8,
                )
        fields["base"] = gr.Textbox(
            "",
            label="Another base",
            info="Folder, file or Hugging Face id of a model of the same family. Empty: the one it was trained on.",
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
            "", label="Prompts of the sheet", info="One a line, each drawn at every save and three strengths. Empty: the prompt above.",
            lines=2, elem_id="preview-sheet-prompts",
        )  # fmt: skip
        sheet = gr.Button("Draw the sheet", elem_id="sheet")
    return fields, sheet, earlier


def _number(label: str, elem_id: str | None, value: float | None, **look: Any) -> gr.Number:
    return gr.Number(value, label=label, elem_id=elem_id, min_width=120, **{"step": 0.05} | look)


def _text_strength(label: str) -> gr.Textbox:
    """A text, since an empty number field shows 0, which would switch the text encoder off."""
    return gr.Textbox("", label=label, info="Empty: the same.", max_lines=1, min_width=120)


def _optional(value: Any, label: str) -> float | None:
    try:
        return float(value) if str(value or "").strip() else None
    except ValueError:
        raise TrainerError(
            f"{label}: {value!s:.20} is no number; leave it empty for the same strength."
        ) from None


def _wire_drawing(page: Page, own: dict, plans: dict[gr.Button, Callable]) -> None:
    fields, pictures = own["fields"], own["pictures"]
    drawing = {
        "inputs": [fields[name] for name in NAMES],
        "outputs": pictures,
        "concurrency_id": "preview",
        "concurrency_limit": 1,
        **QUIET,
    }

    def drawer(plan):
        def draw(*values) -> Iterator[dict]:
            yield from draw_all(page, plan, dict(zip(NAMES, values, strict=True)))

        return draw

    events = [
        fields["prompt"].submit(drawer(plan_compare), **drawing),
        # Release does not fire for the keyboard; input does for both, and the last position wins.
        fields["strength"].input(drawer(plan_compare), trigger_mode="always_last", **drawing),
        *[button.click(drawer(plan), **drawing) for button, plan in plans.items()],
    ]
    pictures.stop_drawing(lambda: {"note": "Stopped."}, None, pictures, cancels=events, **QUIET)


def connect(page: Page, own: dict, others: dict[str, dict]) -> None:
    own["pictures"].go_train(lambda: gr.Tabs(selected="train"), None, page.tabs, **QUIET)


def _run_choices() -> list[tuple[str, str]]:
    """Runs that have saved an adapter, newest first; by folder where several have one name."""
    folders = [folder for folder in runs.all_runs() if runs.status_without_curves(folder).adapters]
    names = Counter(labels.title(folder) for folder in folders)
    return [
        (labels.title(folder) if names[labels.title(folder)] == 1 else folder.name, folder.name)
        for folder in folders
    ]


def _show_runs(choices: list[tuple[str, str]]) -> gr.Dropdown:
    """The first adapter there is is chosen at once; later ones leave the choice alone."""
    return gr.Dropdown(choices, value=choices[0][1]) if len(choices) == 1 else gr.Dropdown(choices)


def _save_choices(folder: Path) -> list[tuple[str, str]]:
    """The chosen file first, then the saves from the last to the first."""
    current = runs.status(folder)
    saves = [
        (f"Step {saved.step}{' ★ best' if saved.step == current.best_step else ''}", saved.file)
        for saved in reversed(current.adapters)
    ]
    if current.file:
        saves.insert(0, (f"The finished file (step {current.file_step})", current.file))
    return [(label, file) for label, file in saves if (folder / file).is_file()]


def show_saves(run_id: str | None, save: str | None, newest: list, before: list) -> list:
    """The saves as they come. Whoever looks at the newest one goes on to the next; any other choice stays. Also what is newest now."""
    if run_id not in [value for _, value in _run_choices()]:
        return [gr.skip(), newest]
    choices = _save_choices(runs.resolve(run_id))
    followed = f"{run_id}/{save}" in [value for _, value in before] or save not in [
        file for _, file in choices
    ]
    return [gr.Dropdown(choices, value=choices[0][1] if choices and followed else save), newest]


def choose_run(run_id: str | None) -> list:
    """Updates of the fields for a run; the newest where none is named. Order as in FROM_RUN."""
    choices = _run_choices()
    run_id = (
        run_id
        if run_id in [value for _, value in choices]
        else next((value for _, value in choices), None)
    )
    if run_id is None:
        return [
            gr.Dropdown([], value=None),
            gr.Dropdown([], value=None),
            *[gr.skip()] * (len(FROM_RUN) - 2),
        ]
    folder = runs.resolve(run_id)
    saves = _save_choices(folder)
    prompt, seed = _first_sample(folder, runs.status(folder))
    chosen = gr.Dropdown(saves, value=saves[0][1] if saves else None)
    sampling = form.widget_values([f"sampling.{name}" for name in SAMPLING], runs.settings(folder))
    return [gr.Dropdown(choices, value=run_id), chosen, prompt, seed, *sampling]


def _first_sample(folder: Path, current: RunStatus) -> tuple[str, int]:
    """Prompt and seed of the first sample, so that the preview begins with a picture the person knows."""
    if current.samples:
        return current.samples[0].prompt, current.samples[0].seed
    run = runs.settings(folder)
    return next(iter(run.sampling.prompts), run.dataset.trigger), run.sampling.seed


def _strength(values: dict[str, Any]) -> float:
    return float(_in_range("Strength", values["strength"], 2))


def _in_range(label: str, value: Any, largest: int) -> Any:
    if not isinstance(value, (int, float)) or not 0 <= value <= largest:
        raise TrainerError(f"{label} is a number from 0 to {largest}.")
    return value


def _request(values: dict[str, Any], save: str | None, strength: float) -> SampleRequest:
    folder = runs.resolve(values["run"])
    if save is not None and save not in [value for _, value in _save_choices(folder)]:
        raise TrainerError("That save is not there any more; choose another.")
    run = runs.settings(folder)
    text_strength = _optional(values["text_strength"], "Strength in the text encoder")
    adapters = (
        [StackedAdapter(str(folder / save), round(strength, 4), text_strength)]
        if save is not None and strength
        else []
    )
    base = previews.preview_base(run.base, str(values["base"] or "").strip())
    return SampleRequest(
        base=base,
        sampler=str(values["sampler"] or "auto"),
        caption_tokens=run.dataset.caption_tokens,
        adapters=[*adapters, *_stacked(values)],
        prompt=str(values["prompt"] or ""),
        seed=_in_range("Seed", values["seed"] or 0, 2**32 - 1),
        negative_prompt=str(values["negative_prompt"] or ""),
        inference_steps=int(values["inference_steps"] or 20),
        guidance_scale=float(values["guidance_scale"] or 7),
        width=int(values["width"] or 0),
        height=int(values["height"] or 0),
    )


@ttl_cached(runs.MOMENT, key=run_folder.runs_folder)
def _file_choices() -> list[tuple[str, str]]:
    """The file of each run that has one: the finished one, else the latest save. Several parts of the page follow it each second."""
    found = [(label, run, _newest_file(runs.resolve(run))) for label, run in _run_choices()]
    return [(label, f"{run}/{file}") for label, run, file in found if file]


def _newest_file(folder: Path) -> str:
    current = runs.status_without_curves(folder)
    files = [current.file, *(saved.file for saved in reversed(current.adapters))]
    return next((file for file in files if file and (folder / file).is_file()), "")


def _stacked(values: dict[str, Any]) -> list[StackedAdapter]:
    """The further adapters, which stay on the pictures of the base too, so that only the first one differs."""
    stacked = []
    for name in MORE:
        if not values[name]:
            continue
        if values[name] not in [value for _, value in _file_choices()]:
            raise TrainerError("One of the further adapters is not there any more; choose another.")
        run, _, file = values[name].partition("/")
        text_strength = _optional(
            values[f"{name}_text_strength"], f"{name.capitalize()} adapter, in the text encoder"
        )
        stacked.append(
            StackedAdapter(
                str(runs.resolve(run) / file), float(values[f"{name}_strength"] or 0), text_strength
            )
        )
    return stacked


def plan_compare(values: dict[str, Any]) -> list[tuple[str, SampleRequest]]:
    strength = _strength(values)
    return [
        ("Without the adapter", _request(values, None, 0)),
        (f"With the adapter, strength {strength:g}", _request(values, values["save"], strength)),
    ]


def plan_strengths(values: dict[str, Any]) -> list[tuple[str, SampleRequest]]:
    return [
        (f"Strength {strength:g}", _request(values, values["save"], strength))
        for strength in STRENGTHS
    ]


def plan_saves(values: dict[str, Any]) -> list[tuple[str, SampleRequest]]:
    folder, strength = runs.resolve(values["run"]), _strength(values)
    current = runs.status(folder)
    saved = [
        (f"Step {save.step}{' ★' if save.step == current.best_step else ''}", save.file)
        for save in current.adapters
        if (folder / save.file).is_file()
    ]
    return [
        ("Base", _request(values, None, 0)),
        *((label, _request(values, file, strength)) for label, file in saved),
    ]


def plan_sheet(values: dict[str, Any]) -> list[tuple[str, SampleRequest]]:
    """Save x strength x prompt, all with the same seed: rows of one prompt and one strength, a column per save."""
    folder = runs.resolve(values["run"])
    prompts = [
        line.strip() for line in str(values["sheet_prompts"] or "").splitlines() if line.strip()
    ] or [str(values["prompt"] or "")]
    saves = [
        (f"step {save.step}", save.file)
        for save in runs.status(folder).adapters
        if (folder / save.file).is_file()
    ]
    sheet = [
        (
            f"{prompt[:40]} · {label} · {strength:g}",
            _request(values | {"prompt": prompt}, file, strength),
        )
        for prompt in prompts
        for strength in SHEET_STRENGTHS
        for label, file in saves
    ]
    if len(sheet) > MAX_IMAGES:
        raise TrainerError(
            f"That would be {len(sheet)} pictures; take fewer prompts, so that there are at most {MAX_IMAGES}."
        )
    return sheet


def elsewhere(request: SampleRequest) -> list[str]:
    """How to get the picture in other programs."""
    tags = " ".join(f"<lora:{Path(a.file).stem}:{a.strength:g}>" for a in request.adapters)
    sampler = "DPM++ 2M" if request.sampler == "auto" else request.sampler
    nodes = ", ".join(
        f"{Path(a.file).name} (strength_model {a.strength:g}, strength_clip {a.strength if a.text_strength is None else a.text_strength:g})"
        for a in request.adapters
    )
    size = (
        "the base's own size"
        if not request.width or not request.height
        else f"{request.width} x {request.height}"
    )
    numbers = f"{request.inference_steps} steps, guidance (CFG) {request.guidance_scale:g}, seed {request.seed}, {size}"
    prompt = " ".join(filter(None, [request.prompt, tags]))
    embeddings = [
        path
        for path in (run_folder.embedding_path(Path(adapter.file)) for adapter in request.adapters)
        if path.is_file()
    ]
    words = [
        f"{path.name} beside it is the trigger word: put it into embeddings, and write {path.stem} in the word's place, "
        f"in ComfyUI embedding:{path.stem}."
        for path in embeddings
    ]
    return [
        *words,
        f"A1111, Forge: put the file into models/Lora. Prompt: {prompt}. Sampler {sampler}, {numbers}; in the settings, random numbers "
        "from the CPU. The downloaded picture says all this itself: drop it on PNG Info.",
        f"ComfyUI: put the file into models/loras. Load LoRA: {nodes or 'none'}. KSampler: {sampler}, {numbers}. Its noise differs, so "
        "the picture is a sibling, not the same.",
    ]


def draw_all(page: Page, plan, values: dict[str, Any]) -> Iterator[dict]:
    """Draws one picture after the other and shows each as soon as it is there."""
    try:
        if not values["run"]:
            raise TrainerError("There is no adapter to show yet; train one first.")
        previews.check_free()
        _check(values)
        wanted = plan(values)
        previews.keep_prompt(wanted[-1][1].prompt)
        note = {"elsewhere": elsewhere(wanted[-1][1])}
        pictures = [
            {"title": title, "src": "", "prompt": request.prompt} for title, request in wanted
        ]
        for number, (_, request) in enumerate(wanted):
            doing = (
                "Drawing"
                if page.engine.is_running
                else "Loading the model; the first picture takes longer"
            )
            yield {"pictures": pictures, "busy": f"{doing} ({number + 1} of {len(wanted)})"}
            file = page.engine.draw(request)
            pictures = [
                *pictures[:number],
                pictures[number] | {"src": f"/previewfile/{file.name}"},
                *pictures[number + 1 :],
            ]
        yield {"pictures": pictures} | note
    except TrainerError as error:
        yield {"error": str(error)}


def _check(values: dict[str, Any]) -> None:
    """What the sampler would refuse, said at once and by the field's name."""
    wrong = form.errors({f"sampling.{name}": values[name] for name in SAMPLING})
    if wrong:
        raise TrainerError(
            " ".join(f"{form.label(path)}: {text}" for path, text in wrong.items() if path)
        )
    for name in ("width", "height"):
        side = values[name] or 0
        if side and (side % 8 or not 32 <= side <= 2048):
            raise TrainerError(f"{name.capitalize()} must be 0 or a multiple of 8 from 32 to 2048.")

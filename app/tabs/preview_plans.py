"""What the buttons of the Preview tab draw: a list of titles and requests for each."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.jobs import previews, runs
from app.jobs.ttl_cache import ttl_cached
from app.settings import form
from app.views import labels
from trainer.errors import TrainerError
from trainer.inference.request import SampleRequest, StackedAdapter
from trainer.runs import run_folder

STRENGTHS = (0.0, 0.4, 0.7, 1.0, 1.3)
"""The strengths of the strength grid."""
SHEET_STRENGTHS = (0.5, 0.75, 1.0)
MAX_IMAGES = 60
"""How many images a sheet may have."""
SAMPLING = ("negative_prompt", "inference_steps", "guidance_scale", "sampler")
MORE = ("second", "third")
"""Further adapters on top of the first."""

PreviewValues = dict[str, Any]
"""The values of the tab's widgets, by name."""
Plan = list[tuple[str, SampleRequest]]
"""The images to draw: title and request of each."""
Planner = Callable[[PreviewValues], Plan]


def run_choices() -> list[tuple[str, str]]:
    """Returns title and id of each run with a saved adapter, newest first.

    Runs with the same title are listed by folder.
    """
    folders = [folder for folder in runs.all_runs() if runs.status_without_curves(folder).adapters]
    titles = [labels.title(folder) for folder in folders]
    counts = Counter(titles)
    return [
        (title if counts[title] == 1 else folder.name, folder.name)
        for title, folder in zip(titles, folders, strict=True)
    ]


def save_choices(folder: Path) -> list[tuple[str, str]]:
    """Returns label and file of each save: the finished file first, then from last to first."""
    current = runs.status(folder)
    saves = []
    if current.file:
        saves.append((f"Finished file (step {current.file_step})", current.file))
    for saved in reversed(current.adapters):
        star = " ★ best" if saved.step == current.best_step else ""
        saves.append((f"Step {saved.step}{star}", saved.file))
    return [(label, file) for label, file in saves if (folder / file).is_file()]


@ttl_cached(runs.MOMENT, key=run_folder.runs_folder)
def file_choices() -> list[tuple[str, str]]:
    """Returns title and "run/file" of the newest adapter file of each run.

    Several parts of the page follow this list each second, so it is cached for a moment.
    """
    files = [(title, run, _newest_file(runs.resolve(run))) for title, run in run_choices()]
    return [(title, f"{run}/{file}") for title, run, file in files if file]


def _newest_file(folder: Path) -> str:
    """Returns the finished file of a run, or its latest save."""
    current = runs.status_without_curves(folder)
    files = [current.file, *(saved.file for saved in reversed(current.adapters))]
    return next((file for file in files if file and (folder / file).is_file()), "")


def plan_compare(values: PreviewValues) -> Plan:
    """Plans one image without the adapter and one with it."""
    strength = _strength(values)
    return [
        ("Without the adapter", _request(values, None, 0)),
        (f"With the adapter, strength {strength:g}", _request(values, values["save"], strength)),
    ]


def plan_strengths(values: PreviewValues) -> Plan:
    """Plans one image per strength."""
    return [
        (f"Strength {strength:g}", _request(values, values["save"], strength))
        for strength in STRENGTHS
    ]


def plan_saves(values: PreviewValues) -> Plan:
    """Plans one image of the base model and one per save."""
    folder, strength = runs.resolve(values["run"]), _strength(values)
    current = runs.status(folder)
    plan = [("Base", _request(values, None, 0))]
    for save in current.adapters:
        if (folder / save.file).is_file():
            star = " ★" if save.step == current.best_step else ""
            plan.append((f"Step {save.step}{star}", _request(values, save.file, strength)))
    return plan


def plan_sheet(values: PreviewValues) -> Plan:
    """Plans every prompt at every strength (rows) and every save (columns), with one seed."""
    folder = runs.resolve(values["run"])
    lines = str(values["sheet_prompts"] or "").splitlines()
    prompts = [line.strip() for line in lines if line.strip()] or [str(values["prompt"] or "")]
    saves = [save for save in runs.status(folder).adapters if (folder / save.file).is_file()]
    plan = []
    for prompt in prompts:
        for strength in SHEET_STRENGTHS:
            for save in saves:
                title = f"{prompt[:40]} · step {save.step} · {strength:g}"
                request = _request(values | {"prompt": prompt}, save.file, strength)
                plan.append((title, request))
    if len(plan) > MAX_IMAGES:
        raise TrainerError(
            f"That would be {len(plan)} images. Use fewer prompts, for at most {MAX_IMAGES}."
        )
    return plan


def _request(values: PreviewValues, save: str | None, strength: float) -> SampleRequest:
    """Returns the request for one image. Without a save, the first adapter is not applied."""
    folder = runs.resolve(values["run"])
    if save is not None and save not in [file for _, file in save_choices(folder)]:
        raise TrainerError("This save no longer exists. Choose another one.")
    run = runs.settings(folder)
    adapters = []
    text_strength = _optional_number(values["text_strength"], "Strength in the text encoder")
    if save is not None and strength:
        adapters.append(StackedAdapter(str(folder / save), round(strength, 4), text_strength))
    return SampleRequest(
        base=previews.preview_base(run.base, str(values["base"] or "").strip()),
        sampler=str(values["sampler"] or "auto"),
        caption_tokens=run.dataset.caption_tokens,
        adapters=[*adapters, *_further_adapters(values)],
        prompt=str(values["prompt"] or ""),
        seed=_number_in_range("Seed", values["seed"] or 0, 2**32 - 1),
        negative_prompt=str(values["negative_prompt"] or ""),
        inference_steps=int(values["inference_steps"] or 20),
        guidance_scale=float(values["guidance_scale"] or 7),
        width=int(values["width"] or 0),
        height=int(values["height"] or 0),
    )


def _further_adapters(values: PreviewValues) -> list[StackedAdapter]:
    """Returns the second and third adapter.

    They are also applied to the images of the base model, so that only the first one differs.
    """
    stacked = []
    for name in MORE:
        if not values[name]:
            continue
        if values[name] not in [value for _, value in file_choices()]:
            raise TrainerError(f"The {name} adapter no longer exists. Choose another one.")
        run, _, file = values[name].partition("/")
        label = f"{name.capitalize()} adapter, in the text encoder"
        text_strength = _optional_number(values[f"{name}_text_strength"], label)
        strength = float(values[f"{name}_strength"] or 0)
        stacked.append(StackedAdapter(str(runs.resolve(run) / file), strength, text_strength))
    return stacked


def _strength(values: PreviewValues) -> float:
    return float(_number_in_range("Strength", values["strength"], 2))


def _number_in_range(label: str, value: Any, largest: int) -> Any:
    if not isinstance(value, (int, float)) or not 0 <= value <= largest:
        raise TrainerError(f"{label} must be a number from 0 to {largest}.")
    return value


def _optional_number(value: Any, label: str) -> float | None:
    try:
        return float(value) if str(value or "").strip() else None
    except ValueError:
        raise TrainerError(
            f"{label}: {value!s:.20} is not a number. Leave it empty to use the same strength."
        ) from None


def check(values: PreviewValues) -> None:
    """Raises TrainerError, with the label of the field, for values that cannot be sampled."""
    errors = form.errors({f"sampling.{name}": values[name] for name in SAMPLING})
    if errors:
        raise TrainerError(
            " ".join(f"{form.label(path)}: {text}" for path, text in errors.items() if path)
        )
    for name in ("width", "height"):
        side = values[name] or 0
        if side and (side % 8 or not 32 <= side <= 2048):
            raise TrainerError(f"{name.capitalize()} must be 0 or a multiple of 8 from 32 to 2048.")


def other_programs(request: SampleRequest) -> list[str]:
    """Returns how to generate the image in other programs, one text per program."""
    tags = [f"<lora:{Path(each.file).stem}:{each.strength:g}>" for each in request.adapters]
    nodes = []
    for adapter in request.adapters:
        clip = adapter.strength if adapter.text_strength is None else adapter.text_strength
        strengths = f"strength_model {adapter.strength:g}, strength_clip {clip:g}"
        nodes.append(f"{Path(adapter.file).name} ({strengths})")
    sampler = "DPM++ 2M" if request.sampler == "auto" else request.sampler
    size = "the base model's size"
    if request.width and request.height:
        size = f"{request.width} x {request.height}"
    numbers = (
        f"{request.inference_steps} steps, guidance (CFG) {request.guidance_scale:g}, "
        f"seed {request.seed}, {size}"
    )
    prompt = " ".join(filter(None, [request.prompt, *tags]))
    return [
        *_embedding_texts(request),
        f"A1111, Forge: put the file into models/Lora. Prompt: {prompt}. Sampler {sampler}, "
        f"{numbers}. In the settings, choose random numbers from the CPU. The downloaded image "
        "contains all of this: drop it on PNG Info.",
        f"ComfyUI: put the file into models/loras. Load LoRA: {', '.join(nodes) or 'none'}. "
        f"KSampler: {sampler}, {numbers}. ComfyUI draws other noise, so the image is similar, "
        "not the same.",
    ]


def _embedding_texts(request: SampleRequest) -> list[str]:
    """Returns how to use the trained trigger words of the adapters."""
    paths = [run_folder.embedding_path(Path(adapter.file)) for adapter in request.adapters]
    return [
        f"{path.name} contains the trigger word. Put it into the embeddings folder, and write "
        f"{path.stem} instead of the word, or embedding:{path.stem} in ComfyUI."
        for path in paths
        if path.is_file()
    ]

"""What scripts and notebooks can do: the same as the page, by names that stay (docs/api.md). Everything goes by id, nothing by path.

Each function is an endpoint of its own name; its docstring is what `client.view_api()` shows.
"""

from functools import wraps
from typing import Any

import gradio as gr

from app.actions import datasets
from app.jobs import previews, run_actions, runs
from app.jobs.previews import Adapter, PreviewRequest
from app.tabs.dataset import add_files
from app.views import charts, files
from trainer import config
from trainer.config import presets
from trainer.errors import ConfigError, StateError, TrainerError

MOST_LOSSES = 200


def build(engine: previews.PreviewEngine) -> None:
    """Adds the endpoints to the Blocks that are being built."""

    def sample(
        run: str,
        prompt: str = "",
        strength: float = 1.0,
        seed: int = 1,
        inference_steps: int = 20,
        guidance_scale: float = 7.0,
    ) -> dict[str, Any]:
        """Draws a picture with a run's adapter at a strength; 0 is the base. Returns its address below that of the page: {"href"}."""
        return draw(engine, run, prompt, strength, seed, inference_steps, guidance_scale)

    for endpoint in (upload, recipes, train, status, act, sample, download):
        gr.api(
            said(endpoint),
            api_name=endpoint.__name__,
            concurrency_limit=1 if endpoint is sample else 4,
        )


def said(endpoint):
    """A TrainerError reaches the client as the error it raises, with its sentence."""

    @wraps(endpoint)
    def answer(*values, **named):
        try:
            return endpoint(*values, **named)
        except TrainerError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return answer


def upload(files: list[dict], dataset: str = "my-dataset") -> dict[str, Any]:
    """Adds pictures, captions or zips, each given by `handle_file`, to a dataset. Returns {"dataset", "pictures", "messages"}."""
    sent = [
        {"path": file.get("path"), "name": file.get("orig_name")}
        for file in files
        if isinstance(file, dict)
    ]
    added = add_files({"dataset": dataset, "files": sent})
    messages = [f"{each['file']}: {each['text']}" for each in added["messages"]]
    return {
        "dataset": added["name"],
        "pictures": len(datasets.scan(added["name"])[0]),
        "messages": messages,
    }


def recipes() -> dict[str, str]:
    """The recipes that ship, by name, with what each is for."""
    return {
        preset.name: f"{preset.title} on {preset.config.base.model}: {preset.purpose}"
        for preset in presets.load_presets().values()
    }


def train(
    dataset: str,
    recipe: str = "embedded-subject",
    name: str = "my-lora",
    settings: dict[str, Any] | None = None,
) -> str:
    """Puts a run into the queue. `settings` are changes by dotted path, such as {"training.steps": 300}. Returns the run's id."""
    folder = datasets.resolve(dataset)
    changes = {"dataset.trigger": datasets.suggest_trigger(datasets.scan(dataset)[0])} | (
        settings or {}
    )
    if "dataset.folder" in changes:
        raise ConfigError("Name the dataset, not its folder.")
    run = config.replace(
        presets.load_preset(recipe).config, {"name": name, "dataset.folder": str(folder)} | changes
    )
    return run_actions.start(run)


def status(run: str) -> dict[str, Any]:
    """Where a run is: {"state", "step", "total_steps", "seconds_left", "losses", "validation", "samples", "file", "message", "actions"}."""
    folder = runs.resolve(run)
    current = runs.status(folder)
    return {
        "state": current.state,
        "step": current.step,
        "total_steps": current.total_steps,
        "seconds_left": current.seconds_left if current.is_active else None,
        "losses": charts.thin(current.losses, MOST_LOSSES),
        "validation": current.validation_losses,
        "samples": [f"/runfile/{folder.name}/{sample.file}" for sample in current.samples],
        "file": files.adapter_file(folder, current),
        "message": current.message,
        "actions": sorted(run_actions.available(current)),
    }


def act(run: str, action: str) -> dict[str, Any]:
    """Does what a button of the page does, one of the "actions" of its status: stop, pause, continue, resume, save, sample, repeat ..."""
    run_actions.act(run, action)
    return {"done": action}


def download(run: str) -> str:
    """The address of a run's adapter file, below that of the page."""
    file = files.adapter_file(folder := runs.resolve(run), runs.status(folder))
    if file is None:
        raise StateError("The run has no adapter yet; its status says how far it is.")
    return file["href"]


def draw(
    engine: previews.PreviewEngine,
    run: str,
    prompt: str,
    strength: float,
    seed: int,
    inference_steps: int,
    guidance_scale: float,
) -> dict[str, Any]:
    previews.check_free()
    folder = runs.resolve(run)
    file = files.adapter_file(folder, runs.status(folder))
    if file is None:
        raise StateError("The run has no adapter yet; its status says how far it is.")
    settings = runs.settings(folder)
    picture = engine.draw(
        PreviewRequest(
            base=settings.base.model_dump(exclude={"precision"}),
            caption_tokens=settings.dataset.caption_tokens,
            adapters=[Adapter(str(folder / file["name"]), strength)] if strength else [],
            prompt=prompt or settings.dataset.trigger,
            seed=seed,
            inference_steps=inference_steps,
            guidance_scale=guidance_scale,
        )
    )
    return {"href": f"/previewfile/{picture.name}"}

"""The API for scripts and notebooks: endpoints whose names and parameters stay (docs/api.md).

Runs and datasets are identified by name, never by path. The docstring of each function is what
`client.view_api()` shows.
"""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import gradio as gr

from app.actions import datasets
from app.actions.uploads import add_files
from app.jobs import previews, run_actions, runs
from app.views import charts, files
from app.views.records import AdapterFile
from trainer import config
from trainer.config import presets
from trainer.errors import ConfigError, StateError, TrainerError
from trainer.inference.request import SampleRequest, StackedAdapter

MAX_LOSSES = 200

P = ParamSpec("P")
T = TypeVar("T")


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
        """Generates an image with a run's adapter. A strength of 0 is the base.

        Returns {"href"}: its URL relative to the page. Without a prompt the trigger word is used.
        """
        return draw(engine, run, prompt, strength, seed, inference_steps, guidance_scale)

    for endpoint in (upload, recipes, train, status, act, sample, download):
        gr.api(
            with_messages(endpoint),
            api_name=endpoint.__name__,
            concurrency_limit=1 if endpoint is sample else 4,
        )


def with_messages(endpoint: Callable[P, T]) -> Callable[P, T]:
    """Returns the endpoint with the messages of TrainerErrors sent to the client."""

    @wraps(endpoint)
    def answer(*values: P.args, **named: P.kwargs) -> T:
        try:
            return endpoint(*values, **named)
        except TrainerError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return answer


def upload(files: list[dict[str, Any]], dataset: str = "my-dataset") -> dict[str, Any]:
    """Adds images, captions or zips, each given by `handle_file`, to a dataset.

    Returns {"dataset", "pictures", "messages"}: its name, the number of images, and the problems.
    """
    sent = []
    for file in files:
        if isinstance(file, dict):
            sent.append({"path": file.get("path"), "name": file.get("orig_name")})
    added = add_files({"dataset": dataset, "files": sent})
    messages = [f"{message['file']}: {message['text']}" for message in added["messages"]]
    return {
        "dataset": added["name"],
        "pictures": len(datasets.scan(added["name"]).items),
        "messages": messages,
    }


def recipes() -> dict[str, str]:
    """Returns the presets that ship, by name, with their purpose."""
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
    """Adds a run to the queue and returns its id.

    `recipe` is the name of a preset. `settings` are changes to it by dotted path, such as
    {"training.steps": 300}.
    """
    folder = datasets.resolve(dataset)
    changes = settings or {}
    if "dataset.folder" in changes:
        raise ConfigError("Give the name of the dataset, not dataset.folder.")
    defaults = {
        "name": name,
        "dataset.folder": str(folder),
        "dataset.trigger": datasets.suggest_trigger(datasets.scan(dataset).items),
    }
    run = config.replace(presets.load_preset(recipe).config, defaults | changes)
    return run_actions.start(run)


def status(run: str) -> dict[str, Any]:
    """Returns how far a run is.

    {"state", "step", "total_steps", "seconds_left", "losses", "validation", "samples", "file",
    "message", "actions"}
    """
    folder = runs.resolve(run)
    current = runs.status(folder)
    return {
        "state": current.state,
        "step": current.step,
        "total_steps": current.total_steps,
        "seconds_left": current.seconds_left if current.is_active else None,
        "losses": charts.thin(current.losses, MAX_LOSSES),
        "validation": current.validation_losses,
        "samples": [files.href(folder, sample.file) for sample in current.samples],
        "file": files.adapter_file(folder, current),
        "message": current.message,
        "actions": sorted(run_actions.available(current)),
    }


def act(run: str, action: str) -> dict[str, Any]:
    """Acts like a button of the page: stop, pause, continue, resume, save, sample, repeat ...

    The possible actions are in the "actions" of the run's status.
    """
    run_actions.act(run, action)
    return {"done": action}


def download(run: str) -> str:
    """Returns the URL of a run's adapter file, relative to the page."""
    return _adapter_of(runs.resolve(run))["href"]


def draw(
    engine: previews.PreviewEngine,
    run: str,
    prompt: str,
    strength: float,
    seed: int,
    inference_steps: int,
    guidance_scale: float,
) -> dict[str, Any]:
    """Generates a sample with a run's adapter. Returns {"href"}."""
    previews.check_free()
    folder = runs.resolve(run)
    adapter = StackedAdapter(str(folder / _adapter_of(folder)["name"]), strength)
    settings = runs.settings(folder)
    image = engine.draw(
        SampleRequest(
            base=previews.preview_base(settings.base),
            caption_tokens=settings.dataset.caption_tokens,
            adapters=[adapter] if strength else [],
            prompt=prompt or settings.dataset.trigger,
            seed=seed,
            inference_steps=inference_steps,
            guidance_scale=guidance_scale,
        )
    )
    return {"href": f"/previewfile/{image.name}"}


def _adapter_of(folder: Path) -> AdapterFile:
    file = files.adapter_file(folder, runs.status(folder))
    if file is None:
        raise StateError("The run has no adapter yet; its status shows how far it is.")
    return file

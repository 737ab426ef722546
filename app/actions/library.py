"""What the Library does with runs: names and tags, delete and undo, two side by side, a model card, and the way to the Hub."""

import itertools
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from app.jobs import runs
from app.settings import form
from app.views import run_view
from trainer.errors import StateError, TrainerError
from trainer.runs import run_folder
from trainer.runs.atomic_files import atomic_write
from trainer.runs.events import SampleSaved
from trainer.runs.run_status import RunStatus

NOTES = "library.json"
KEPT_FOR = 7 * 24 * 3600  # seconds that a deleted run can be brought back
MOST_TAGS = 12


def notes(folder: Path) -> dict[str, Any]:
    """Name and tags that were given after the training: {"name": "", "tags": []}."""
    try:
        kept = json.loads((folder / NOTES).read_text(encoding="utf-8"))
        return {"name": str(kept["name"]), "tags": [str(tag) for tag in kept["tags"]]}
    except (OSError, ValueError, KeyError, TypeError):
        return {"name": "", "tags": []}


def name_of(folder: Path) -> str:
    return notes(folder)["name"] or run_view.title(folder)


def describe(run_id: object, name: object, tags: object) -> None:
    """Renames the card and sets its tags; the files keep their names, which other programs know."""
    folder = runs.resolve(run_id)
    words = [" ".join(str(tag).split())[:30] for tag in (tags if isinstance(tags, list) else [])]
    given = " ".join(str(name or "").split())[:80]
    kept = {
        "name": "" if given == run_view.title(folder) else given,
        "tags": list(dict.fromkeys(filter(None, words)))[:MOST_TAGS],
    }
    atomic_write(folder / NOTES, json.dumps(kept, ensure_ascii=False))


def removed_folder() -> Path:
    return run_folder.outputs_folder() / "removed"


def delete(run_id: object) -> None:
    """Puts a run aside for a week. Raises StateError for one that is at work or waits."""
    folder = runs.resolve(run_id)
    if "delete" not in runs.actions(runs.status(folder)):
        raise StateError("A run that is at work or waits cannot be deleted; stop it first.")
    removed_folder().mkdir(parents=True, exist_ok=True)
    for old in removed_folder().iterdir():
        if time.time() - old.stat().st_mtime > KEPT_FOR:
            shutil.rmtree(old)
    target = removed_folder() / folder.name
    if target.exists():  # another one of that name
        os.replace(target, target.with_name(f"{folder.name}-{time.time_ns()}"))
    shutil.move(folder, target)
    target.touch()


def restore(run_id: object) -> None:
    kept = removed_folder() / str(run_id)
    if (
        not isinstance(run_id, str)
        or Path(run_id).name != run_id
        or not (kept / "run.toml").is_file()
        or kept.is_symlink()
    ):
        raise StateError("That run cannot be brought back any more.")
    if (run_folder.runs_folder() / run_id).exists():
        raise StateError("There is a run of that name again; rename its folder first.")
    shutil.move(kept, run_folder.runs_folder() / run_id)


def compare(first: object, second: object) -> dict:
    """Two runs side by side: the settings that differ, both smoothed curves, a sample of each of the same prompt where there is one."""
    folders = [runs.resolve(first), runs.resolve(second)]
    one, other = (runs.settings(folder) for folder in folders)
    paths = [path for path in form.all_fields() if path not in ("name",)]
    different = form.changed(other, one, paths)
    statuses = [runs.status(folder) for folder in folders]
    samples, longer = (
        [run_view.samples_of_file(each) for each in statuses],
        max(len(each.losses) for each in statuses),
    )
    shared = next(
        (pair for pair in itertools.product(*samples) if pair[0].prompt == pair[1].prompt),
        [next(iter(each), None) for each in samples],
    )
    return {
        "settings": different,
        "runs": [_side(*each, longer) for each in zip(folders, statuses, shared, strict=True)],
    }


def _side(folder: Path, current: RunStatus, sample: SampleSaved | None, longer: int) -> dict:
    """Both curves are smoothed alike, else the same losses would look different."""
    return {
        "name": name_of(folder),
        "steps": current.step,
        "loss": run_view.thin(run_view.smooth(current.losses, longer)),
        "validation": current.validation_losses,
        "sample": f"/runfile/{folder.name}/{sample.file}" if sample else "",
        "prompt": sample.prompt if sample else "",
    }


def model_card(run_id: object) -> str:
    """A README.md in the form of the Hugging Face Hub."""
    folder = runs.resolve(run_id)
    run, current = runs.settings(folder), runs.status(folder)
    file = run_view.final_file(folder, current)
    if file is None:
        raise StateError("The run has no adapter yet.")
    base = run.base.model
    on_hub = not Path(base).is_absolute() and "/" in base
    front = [
        "---",
        "library_name: diffusers",
        "tags: [lora, text-to-image, stable-diffusion]",
        *([f"base_model: {base}"] if on_hub else []),
    ]
    shown = [f"![{sample.prompt}]({sample.file})" for sample in run_view.samples_of_file(current)]
    trigger = (
        f"Trigger word: `{run.dataset.trigger}`.\n"
        if run.dataset.trigger
        else "It has no trigger word.\n"
    )
    body = f"""
# {name_of(folder)}

A LoRA for {base if on_hub else Path(base).name}, rank {run.adapter.rank}, trained for {current.file_step or current.step} steps. {trigger}
Start at a strength of 0.8.

{chr(10).join(shown)}

```python
pipe.load_lora_weights(".", weight_name="{file["name"]}", adapter_name="it")
pipe.set_adapters(["it"], [0.8])
```

In A1111 and Forge: `<lora:{Path(file["name"]).stem}:0.8>`; in ComfyUI: a Load LoRA node.
{_embedding_note(file)}"""
    return "\n".join(front) + "\n---\n" + body


def _embedding_note(file: dict) -> str:
    if not file["embedding"]:
        return ""
    name = Path(file["embedding"]["name"]).stem
    return f"\nThe trigger word is an embedding beside it: in prompts write `{name}` in its place, in ComfyUI `embedding:{name}`.\n"


def push(run_id: object, repository: object, is_private: bool, api: HfApi | None = None) -> str:
    """Uploads adapter, samples and card to the Hub. Returns its address. Only ever called for a person who asked for it."""
    folder, api = runs.resolve(run_id), api or HfApi()
    file = run_view.final_file(folder, runs.status(folder))
    if file is None:
        raise TrainerError("This run has no adapter yet.")
    card = model_card(run_id)
    try:
        address = api.create_repo(str(repository or ""), private=is_private, exist_ok=True)
        samples = [sample.file for sample in run_view.samples_of_file(runs.status(folder))]
        embedding = [file["embedding"]["name"]] if file["embedding"] else []
        for path in [file["name"], *embedding, *samples]:
            api.upload_file(
                path_or_fileobj=folder / path, path_in_repo=path, repo_id=address.repo_id
            )
        api.upload_file(
            path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=address.repo_id
        )
    except LocalTokenNotFoundError:
        raise TrainerError(
            "Sign in first: run `hf auth login` in a terminal, then push again."
        ) from None
    except HFValidationError as error:
        raise TrainerError(
            f"The repository is named like user/name: {str(error).splitlines()[0]}"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        hint = (
            "Sign in with `hf auth login`, with a token that may write."
            if status in (401, 403)
            else "Check the connection, and try again."
        )
        raise TrainerError(
            f"The Hub did not take it ({str(error).splitlines()[0][:200]}). {hint}"
        ) from None
    return str(address)

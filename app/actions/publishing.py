"""The model card of a run, and its upload to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from app.jobs import runs
from app.views import files, run_notes
from app.views.records import AdapterFile
from trainer.errors import StateError, TrainerError

MAX_REASON_LENGTH = 200

CARD = """---
library_name: diffusers
tags: [lora, text-to-image, stable-diffusion]
{base_model}---

# {name}

A LoRA for {base}, rank {rank}, trained for {steps} steps. {trigger}

Start at a strength of 0.8.

{samples}

```python
pipe.load_lora_weights(".", weight_name="{file}", adapter_name="it")
pipe.set_adapters(["it"], [0.8])
```

In A1111 and Forge: `<lora:{stem}:0.8>`; in ComfyUI: a Load LoRA node.
{embedding}"""


def model_card(run_id: object) -> str:
    """Returns the README.md of a run for the Hugging Face Hub.

    Raises StateError if the run has no adapter.
    """
    folder = runs.resolve(run_id)
    run, current = runs.settings(folder), runs.status(folder)
    file = files.adapter_file(folder, current)
    if file is None:
        raise StateError("This run has no adapter yet.")
    base = run.base.model
    is_on_hub = not Path(base).is_absolute() and "/" in base
    trigger = run.dataset.trigger
    samples = files.samples_of_adapter(current)
    return CARD.format(
        base_model=f"base_model: {base}\n" if is_on_hub else "",
        name=run_notes.name_of(folder),
        base=base if is_on_hub else Path(base).name,
        rank=run.adapter.rank,
        steps=current.file_step or current.step,
        trigger=f"Trigger word: `{trigger}`." if trigger else "It has no trigger word.",
        samples="\n".join(f"![{sample.prompt}]({sample.file})" for sample in samples),
        file=file["name"],
        stem=Path(file["name"]).stem,
        embedding=_embedding_note(file),
    )


def _embedding_note(file: AdapterFile) -> str:
    if not file["embedding"]:
        return ""
    word = Path(file["embedding"]["name"]).stem
    return (
        "\nThe trigger word is an embedding in a second file: "
        f"in prompts write `{word}` instead of it, in ComfyUI `embedding:{word}`.\n"
    )


def push(run_id: object, repository: object, is_private: bool, api: HfApi | None = None) -> str:
    """Uploads adapter, samples and model card to the Hub. Returns the URL of the repository.

    Called only if a person requested the upload. Raises TrainerError with the Hub's reason.
    """
    folder = runs.resolve(run_id)
    api = api or HfApi()
    names = _files_to_upload(folder)
    card = model_card(run_id)
    try:
        url = api.create_repo(str(repository or ""), private=is_private, exist_ok=True)
        for name in names:
            api.upload_file(path_or_fileobj=folder / name, path_in_repo=name, repo_id=url.repo_id)
        api.upload_file(
            path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=url.repo_id
        )
    except LocalTokenNotFoundError:
        raise TrainerError(
            "You are not signed in. Run `hf auth login` in a terminal, then push again."
        ) from None
    except HFValidationError as error:
        raise TrainerError(
            "A repository name has the form user/name. "
            f"The Hub refused {str(repository)!r}: {_first_line(error)}"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise TrainerError(
            f"The upload to the Hub failed ({_first_line(error)}). {_hint(error)}"
        ) from None
    return str(url)


def _files_to_upload(folder: Path) -> list[str]:
    current = runs.status(folder)
    file = files.adapter_file(folder, current)
    if file is None:
        raise StateError("This run has no adapter yet.")
    names = [file["name"]]
    if file["embedding"]:
        names.append(file["embedding"]["name"])
    return names + [sample.file for sample in files.samples_of_adapter(current)]


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:MAX_REASON_LENGTH] if lines else type(error).__name__


def _hint(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return "Sign in with `hf auth login`, with a token that has write access."
    return "Check the connection, and try again."

"""Models of the Hugging Face hub, downloaded into its own cache. The token is the hub's own: HF_TOKEN, or that of `hf auth login`."""

import re
from collections.abc import Callable, Collection
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,  # that of the library it speaks HTTP with, which is not the same in all its versions
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm

from trainer.errors import ModelError
from trainer.models.model_files import ALL_PARTS
from trainer.runs.events import Progress

# The folders of the parts only: repositories also hold single files, other formats and older VAEs. No code, and no pickle.
MODEL_FILES = [
    "model_index.json",
    *(
        f"{part}/{files}"
        for part in sorted(ALL_PARTS)
        for files in ("*.json", "merges.txt", "*.model", "*.safetensors")
    ),
]
VAE_FILES = ["config.json", "*.safetensors"]
Report = Callable[[Progress], Any]


def wanted_files(names: Collection[str], patterns: Collection[str] = MODEL_FILES) -> list[str]:
    """Of a repository's files those that are loaded; an fp16 edition only where there is no other. The first pattern's come last.

    A folder counts as downloaded once that one is there, so an interrupted download is gone on with.
    """
    kept = [
        name
        for name in sorted(names)
        if any(
            fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns
        )
    ]
    plain = {name for name in kept if not re.search(r"\.(fp16|non_ema)[.\-]", name)}
    kept = [
        name
        for name in kept
        if ".non_ema" not in name and (name in plain or name.replace(".fp16", "", 1) not in plain)
    ]
    first = next(iter(patterns))
    return sorted(kept, key=lambda name: name == first)


def download(model: str, revision: str, patterns: Collection[str], report: Report) -> Path:
    """The folder of a model in the cache, with what it lacks downloaded. Raises ModelError in a sentence."""
    first = next(iter(patterns))
    try:
        listed = (
            HfApi().model_info(model, revision=revision or None, files_metadata=True).siblings or []
        )
        sizes = {file.rfilename: file.size or 0 for file in listed}
        wanted = wanted_files(sizes, patterns)
        if first not in wanted:
            raise ModelError(_without(model, first, sizes))
        done, total = 0, sum(sizes[name] for name in wanted)
        for name in wanted:
            path = hf_hub_download(
                model, name, revision=revision or None, tqdm_class=_counter(done, total, report)
            )
            done += sizes[name]
            report(_progress(done, total))
        return Path(path).parent
    except (HTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(_why(model, revision, error)) from None


def _progress(done: float, total: int) -> Progress:
    return Progress("downloading", int(done / 1e6), int(total / 1e6))


def _counter(before: int, total: int, report: Report) -> type[tqdm]:
    """A progress bar that draws nothing and reports its place in the whole download."""

    class Counter(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs | {"disable": True})
            self.received = kwargs.get("initial", 0)

        def update(self, n: float | None = 1) -> None:
            self.received += n or 0
            report(_progress(min(before + self.received, total), total))

    return Counter


def _without(model: str, first: str, names: Collection[str]) -> str:
    single = sorted(name for name in names if name.endswith(".safetensors"))
    advice = f"download {single[0]} by hand and give its path" if single else "choose another"
    return (
        f"The repository {model} has no {first}, so it is no model in diffusers' layout; {advice}."
    )


def _why(model: str, revision: str, error: Exception) -> str:
    """One sentence without addresses and tokens."""
    if isinstance(error, OfflineModeIsEnabled) or isinstance(error.__cause__, OfflineModeIsEnabled):
        reason = "HF_HUB_OFFLINE is set, so nothing is fetched"
    elif isinstance(error, GatedRepoError):
        reason = "its owner wants its terms accepted first: do so on its page, then log in with `hf auth login` or set HF_TOKEN"
    elif isinstance(error, RevisionNotFoundError):
        reason = f"it has no revision {revision}"
    elif isinstance(error, RepositoryNotFoundError):
        reason = "there is no such model, or it is private and HF_TOKEN has no right to it"
    else:
        reason = re.sub(
            r"https?://\S+", "the hub", (str(error).splitlines() or [type(error).__name__])[0]
        )[:200]
    return (
        f"The model {model} is not on this machine and could not be downloaded ({reason}). "
        "Check its name and the network, or give the path of a model on this machine."
    )

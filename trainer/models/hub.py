"""Downloads models of the Hugging Face hub into the hub client's own cache.

The client takes the token from HF_TOKEN, or from `hf auth login`.
"""

import re
from collections.abc import Callable, Collection
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,  # from requests or httpx, depending on the version of huggingface_hub
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm

from trainer.errors import ModelError
from trainer.models.pipelines import ALL_PARTS
from trainer.runs.events import Progress

PART_FILES = ("*.json", "merges.txt", "*.model", "*.safetensors")
MODEL_FILES = ["model_index.json"]
for part in sorted(ALL_PARTS):
    MODEL_FILES += [f"{part}/{pattern}" for pattern in PART_FILES]
"""Patterns of the files of a base model: the folders of its components, without code and pickles.
Repositories also contain single files, other formats and older VAEs."""
VAE_FILES = ["config.json", "*.safetensors"]

Report = Callable[[Progress], Any]
"""Receives the progress of a download, in megabytes."""


def wanted_files(names: Collection[str], patterns: Collection[str] = MODEL_FILES) -> list[str]:
    """Returns the files of a repository that are loaded.

    An fp16 edition is taken only if it is the only one. The file that matches the first
    pattern comes last: it marks a complete download, so an interrupted one is continued.
    """
    matching = [name for name in sorted(names) if _matches(name, patterns)]
    full_precision = {name for name in matching if not re.search(r"\.(fp16|non_ema)[.\-]", name)}

    def is_best_edition(name: str) -> bool:
        if ".non_ema" in name:
            return False
        return name in full_precision or name.replace(".fp16", "", 1) not in full_precision

    first = next(iter(patterns))
    return sorted(filter(is_best_edition, matching), key=lambda name: name == first)


def _matches(name: str, patterns: Collection[str]) -> bool:
    """Returns whether a name matches a pattern in the same folder; "*" would also match "/"."""
    return any(
        fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns
    )


def download(model: str, revision: str, patterns: Collection[str], report: Report) -> Path:
    """Returns the folder of a model in the cache, after downloading every missing file.

    Raises ModelError if the model cannot be downloaded or has no file for the first pattern.
    """
    first = next(iter(patterns))
    try:
        info = HfApi().model_info(model, revision=revision or None, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        wanted = wanted_files(sizes, patterns)
        if first not in wanted:
            raise ModelError(_missing_file_message(model, first, sizes))
        done, total = 0, sum(sizes[name] for name in wanted)
        for name in wanted:
            bar = _progress_bar(done, total, report)
            path = hf_hub_download(model, name, revision=revision or None, tqdm_class=bar)
            done += sizes[name]
            report(_progress(done, total))
        return Path(path).parent
    except (HTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = _reason(revision, error)
        raise ModelError(
            f"The model {model} is not on this machine and could not be downloaded ({reason}). "
            "Check its name and the network, or give the path of a model on this machine."
        ) from None


def _progress(done: float, total: int) -> Progress:
    """Returns the event for a number of bytes."""
    return Progress("downloading", int(done / 1e6), int(total / 1e6))


def _progress_bar(before: int, total: int, report: Report) -> type[tqdm]:
    """Returns a progress bar class that draws nothing and reports the bytes of the whole download.

    `before` is the number of bytes in earlier files.
    """

    class ReportingBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"disable": True})
            self.received = kwargs.get("initial", 0)

        def update(self, n: float | None = 1) -> None:
            self.received += n or 0
            report(_progress(min(before + self.received, total), total))

    return ReportingBar


def _missing_file_message(model: str, first: str, names: Collection[str]) -> str:
    single_files = sorted(name for name in names if name.endswith(".safetensors"))
    if single_files:
        advice = f"download {single_files[0]} by hand and give its path"
    else:
        advice = "choose another"
    return (
        f"The repository {model} has no {first}, so it is not a model in diffusers' layout; "
        f"{advice}."
    )


def _reason(revision: str, error: Exception) -> str:
    """Returns why a download failed, without addresses and tokens."""
    if isinstance(error, OfflineModeIsEnabled) or isinstance(error.__cause__, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing is downloaded"
    if isinstance(error, GatedRepoError):
        return (
            "its owner requires you to accept its terms: do so on its page, "
            "then log in with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {revision}"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such model, or it is private and HF_TOKEN has no access to it"
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"https?://\S+", "the hub", first_line)[:200]

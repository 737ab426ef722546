"""The model families, one file each, and the loading that is the same for all."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import nn

from trainer import base_model
from trainer.config import Base
from trainer.errors import ModelError
from trainer.families.base import ModelFamily
from trainer.families.sd1 import StableDiffusion1
from trainer.families.sd2 import StableDiffusion2
from trainer.families.sd3 import StableDiffusion3
from trainer.families.sdxl import StableDiffusionXL
from trainer.memory import ran_out

FAMILIES: dict[str, ModelFamily] = {
    "sd1": StableDiffusion1(),
    "sd2": StableDiffusion2(),
    "sdxl": StableDiffusionXL(),
    **{f"sd{size}": StableDiffusion3(size) for size in ("3m", "35m", "35l")},
}

# The folders of the parts only: repositories also hold single files, other formats and older VAEs.
HUB_FILES = [
    "model_index.json",
    *(f"{part}/{files}" for part in sorted(base_model.ALL_PARTS) for files in ("*.json", "merges.txt", "*.safetensors")),
]
HUB_FILES_LEFT = ["*.fp16.safetensors", "*.fp16-*.safetensors", "*.non_ema.safetensors"]


@dataclass(frozen=True)
class LoadedBase:
    """A base model on the CPU, frozen, checked to be complete and finite."""

    family: ModelFamily
    pipe: Any
    files: base_model.BaseFiles

    @property
    def denoiser(self) -> nn.Module:
        return self.family.denoiser(self.pipe)


def family_of(files: base_model.BaseFiles) -> ModelFamily:
    """The one place where the family is decided. Raises ModelError where none fits."""
    for family in FAMILIES.values():
        if family.matches(files):
            return family
    known, denoiser = ", ".join(family.name for family in FAMILIES.values()), base_model.DENOISERS[files.denoiser]
    raise ModelError(f"{files.path.name} is a {files.pipeline} with another {denoiser} than those that can be trained ({known}).")


def load_base(base: Base, dtype: torch.dtype) -> LoadedBase:
    """Loads a base model. Raises ModelError in a sentence when it is missing, incomplete or not what it says.

    The VAE stays in float32 whatever the dtype: in fp16 it can overflow to black pictures.
    """
    files = base_model.inspect(base_model.locate(base) or _download(base), base.t5)
    family = family_of(files)
    try:
        pipe = family.pipeline_class.from_pretrained(
            files.path,
            torch_dtype={"vae": torch.float32, "default": dtype},
            use_safetensors=True,
            variant=files.variant,
            local_files_only=True,
            **family.pipeline_options,
            **dict.fromkeys(files.left_out),
        )
    except (ValueError, RuntimeError, OSError, KeyError, TypeError, AttributeError) as error:
        if ran_out(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"The base model {files.path.name} does not fit together ({reason[:200]}). Download it again.") from None
    pipe.set_progress_bar_config(disable=True)
    for part, expected in files.tensors.items():
        module = getattr(pipe, part)
        _check_complete(files.path, part, module, set(expected))
        module.requires_grad_(False).eval()
    for part in files.tokenizers:
        if (words := len(getattr(pipe, part))) < 300:
            raise ModelError(
                f"The {part} of {files.path.name} knows only {words} words; its vocabulary is damaged. Download the model again."
            )
    return LoadedBase(family, pipe, files)


def _download(base: Base) -> Path:
    try:
        left = HUB_FILES_LEFT + ([] if base.t5 else [f"{part}/*" for part in base_model.T5_PARTS])
        return Path(snapshot_download(base.model, revision=base.revision or None, allow_patterns=HUB_FILES, ignore_patterns=left))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ModelError(
            f"The base model {base.model} is not on this machine and could not be downloaded ({reason}). "
            "Check its name and the network, or give the path of a model folder."
        ) from None


def _check_complete(folder: Path, part: str, module: nn.Module, stored: set[str]) -> None:
    """Loaders fill what a file lacks with random numbers, or leave it out, and say so only in a log."""
    stored = {name.removeprefix("text_model.") for name in stored}
    state = module.state_dict()
    held = {tensor.data_ptr() for name, tensor in state.items() if name.removeprefix("text_model.") in stored}  # T5 has one twice
    missing = [name for name, tensor in state.items() if tensor.data_ptr() not in held and not name.endswith("position_ids")]
    if missing:
        raise ModelError(
            f"{folder.name}/{part} lacks {len(missing)} of {len(state)} tensors (such as {missing[0]}); "
            "the file is incomplete. Download it again."
        )
    for name, tensor in state.items():
        if tensor.is_meta or not torch.isfinite(tensor).all():
            raise ModelError(f"{folder.name}/{part} holds numbers that are not finite (in {name}); the file is damaged. Download it again.")

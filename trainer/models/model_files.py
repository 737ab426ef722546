"""Finds a base model on this machine and checks it before anything is loaded.

Only file names, JSON and tensor headers are read. Nothing in a model is ever executed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from trainer.config import EMBEDDED, Base
from trainer.errors import ModelError
from trainer.models.diffusers_folder import has_t5, read_folder
from trainer.models.pipelines import DENOISERS, PIPELINES, T5_PARTS
from trainer.models.safetensors_header import TensorInfo
from trainer.models.single_file import read_single_file

EMBEDDED_FOLDER = Path(__file__).resolve().parents[1] / "embedded" / "base"


@dataclass(frozen=True)
class BaseFiles:
    """The files of a base model that passed the checks."""

    path: Path
    """A folder in diffusers' layout, or a single .safetensors file."""
    pipeline: str
    """Class name of the diffusers pipeline, a key of PIPELINES."""
    configs: dict[str, dict[str, Any]]
    """config.json of each component and of "scheduler"; derived from tensor shapes for a single
    file."""
    tensors: dict[str, dict[str, TensorInfo]]
    """Component -> tensor name -> type and shape."""
    weights: dict[str, list[Path]]
    """Component -> the files that contain its tensors, several if the weights are sharded."""
    variant: str | None = None
    """"fp16" if the weights of a folder are named *.fp16.safetensors."""
    template: str | None = None
    """Name of the shipped configurations that a single file is loaded with; None for a folder."""
    notes: tuple[str, ...] = ()
    """Sentences for the user about anything unusual."""

    @property
    def denoiser(self) -> str:
        """Component of the network that is trained: "unet" or "transformer"."""
        return next(part for part in DENOISERS if part in self.tensors)

    @property
    def text_encoders(self) -> list[str]:
        """Components of all text encoders, in the order of the pipeline."""
        return [part for part in self.tensors if part.startswith("text_encoder")]

    @property
    def trainable_text_encoders(self) -> list[str]:
        """Components of the CLIP text encoders.

        T5 is never trained, because it is larger than all other components together.
        """
        return [part for part in self.text_encoders if self._is_clip(part)]

    def _is_clip(self, part: str) -> bool:
        return all(name.startswith("CLIP") for _, name in PIPELINES[self.pipeline][part])

    @property
    def tokenizers(self) -> list[str]:
        """Components of the tokenizers, in the order of the pipeline."""
        names = [part for part in PIPELINES[self.pipeline] if part.startswith("tokenizer")]
        return [part for part in names if part not in self.absent_parts]

    @property
    def absent_parts(self) -> list[str]:
        """Components of the pipeline that this model lacks and also works without."""
        if "text_encoder_3" in self.tensors:
            return []
        return [part for part in T5_PARTS if part in PIPELINES[self.pipeline]]


def locate(base: Base) -> Path | None:
    """Returns the folder or file of a base model on this machine.

    Returns None for a Hugging Face model that is not downloaded yet, or was downloaded without the
    T5 that these settings use.
    """
    if base.model == EMBEDDED:
        return EMBEDDED_FOLDER
    folder = _on_this_machine(base.model, "model_index.json", base.revision)
    if folder is None or not base.t5:
        return folder
    is_in_cache = is_hub_id(base.model) and not Path(base.model).expanduser().exists()
    if is_in_cache and has_t5(folder) and not (folder / "text_encoder_3").is_dir():
        return None
    return folder


def locate_vae(base: Base) -> Path | None:
    """Returns the folder or file of `base.vae` on this machine, or None if it is not there."""
    return _on_this_machine(base.vae, "config.json")


def _on_this_machine(model: str, file: str, revision: str = "") -> Path | None:
    """Returns a path as it is, and for a Hugging Face model the cached folder with this file."""
    path = Path(model).expanduser()
    if path.exists() or not is_hub_id(model):
        return path
    cached = try_to_load_from_cache(model, file, revision=revision or None)
    return Path(cached).parent if isinstance(cached, str) else None


def is_hub_id(model: str) -> bool:
    """Returns whether a model is named as on Hugging Face, "owner/name", and not by a path."""
    owner, _, name = model.partition("/")
    looks_like_path = model.startswith((".", "~", "/")) or "\\" in model or "/" in name
    return bool(owner and name) and not looks_like_path


def inspect(path: Path, t5: bool = True) -> BaseFiles:
    """Checks a base model by its names and headers, without T5 unless `t5` is true.

    Raises ModelError if it cannot be trained; the message describes what the path contains instead.
    """
    if path.is_file():
        return _inspect_single_file(path)
    if not path.is_dir():
        raise ModelError(f"There is no base model at {path}.")
    found = read_folder(path, t5)
    files = BaseFiles(
        path, found.pipeline, found.configs, found.tensors, found.weights, found.variant
    )
    _check_latents(files)
    return files


def _inspect_single_file(path: Path) -> BaseFiles:
    found = read_single_file(path)
    return BaseFiles(
        path,
        found.pipeline,
        found.configs,
        found.tensors,
        weights={part: [path] for part in found.tensors},
        template=found.template,
        notes=found.notes,
    )


def _check_latents(files: BaseFiles) -> None:
    """Raises ModelError unless the denoiser takes exactly the latents of the VAE."""
    vae = files.configs["vae"]
    inputs = files.configs[files.denoiser].get("in_channels")
    latents = vae.get("latent_channels", 4)
    if inputs != latents:
        raise ModelError(
            f"{files.path.name} has a {DENOISERS[files.denoiser]} with {inputs} input channels for "
            f"latents of {latents} (an inpainting or depth model); "
            "train on the ordinary model of the same family."
        )
    if vae.get("latents_mean"):
        raise ModelError(
            f"{files.path.name} has a VAE that shifts its latents (latents_mean), "
            "unlike every Stable Diffusion that can be trained here. Use another model."
        )

"""The model families, one file each, and the loading that is the same for all."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import nn

from trainer.config import Base
from trainer.errors import ModelError
from trainer.families import from_single_file
from trainer.families.base import PLAIN_READING, Conditioning, ModelFamily, Reading
from trainer.families.sd1 import StableDiffusion1
from trainer.families.sd2 import StableDiffusion2
from trainer.families.sd3 import StableDiffusion3
from trainer.families.sdxl import StableDiffusionXL
from trainer.lora.formats.reader import AdapterFile
from trainer.models import hub, model_files
from trainer.models.device import ran_out

FAMILIES: dict[str, ModelFamily] = {
    "sd1": StableDiffusion1(),
    "sd2": StableDiffusion2(),
    "sdxl": StableDiffusionXL(),
    **{f"sd{size}": StableDiffusion3(size) for size in ("3m", "35m", "35l")},
}


@dataclass(frozen=True)
class LoadedBase:
    """A base model on the CPU, frozen, checked to be complete and finite."""

    family: ModelFamily
    pipe: Any
    files: model_files.BaseFiles
    reading: Reading = PLAIN_READING

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """As this run reads captions and prompts; with gradients where the caller has them on."""
        return self.family.encode_prompts(self.pipe, prompts, self.reading)

    @property
    def denoiser(self) -> nn.Module:
        return self.family.denoiser(self.pipe)

    @property
    def components(self) -> dict[str, nn.Module]:
        """What may have an adapter, by the name in the pipeline: {"unet": ..., "text_encoder": ...}."""
        name = next(name for name, part in self.pipe.components.items() if part is self.denoiser)
        return {name: self.denoiser, **self.family.text_encoders(self.pipe)}


def family_of(files: model_files.BaseFiles) -> ModelFamily:
    """The one place where the family is decided. Raises ModelError where none fits."""
    for family in FAMILIES.values():
        if family.matches_base(files):
            return family
    known, denoiser = (
        ", ".join(family.name for family in FAMILIES.values()),
        model_files.DENOISERS[files.denoiser],
    )
    raise ModelError(
        f"{files.path.name} is a {files.pipeline} with another {denoiser} than those that can be trained ({known})."
    )


def families_of_adapter(file: AdapterFile) -> list[str]:
    """Names of the families an adapter may have been trained for; none where it does not tell.

    Told by the width of the text that its attention reads, else by what it says of itself, else by what it changes. What it says may be a
    family unknown here.
    """
    paths = {f"{module.component}.{module.name}" for module in file.modules}
    widths = {
        module.to("meta").delta.shape[1]
        for module in file.modules
        if module.component == "unet" and module.name.endswith("attn2.to_k")
    }
    said = [
        file.metadata[key]
        for key in ("modelspec.architecture", "ss_base_model_version")
        if file.metadata.get(key)
    ]
    for fits in (
        lambda family: family.text_width in widths,
        lambda family: any(word.startswith(family.metadata_prefixes) for word in said),
        lambda family: family.matches_adapter_keys(paths),
    ):
        if found := [family.name for family in FAMILIES.values() if fits(family)]:
            return found
    return said[:1]


def load_base(
    base: Base,
    dtype: torch.dtype,
    caption_tokens: int = 75,
    report: hub.Report = lambda event: None,
) -> LoadedBase:
    """Loads a base model. Raises ModelError in a sentence when it is missing, incomplete or not what it says.

    The VAE stays in float32 whatever the dtype: in fp16 it can overflow to black pictures.
    """
    files = find_files(base, report)
    family = family_of(files)
    reading = _reading(base, caption_tokens, files, family)
    try:
        pipe = _load_pipeline(files, family, dtype)
    except (ValueError, RuntimeError, OSError, KeyError, TypeError, AttributeError) as error:
        if ran_out(error):
            raise
        reason = (
            "tensors are missing"
            if "meta tensor" in str(error)
            else (str(error).splitlines() or [type(error).__name__])[0]
        )
        raise ModelError(
            f"The base model {files.path.name} does not fit together ({reason[:200]}). Download it again."
        ) from None
    pipe.set_progress_bar_config(disable=True)
    for part, stored in files.tensors.items():
        module = getattr(pipe, part)
        # A single file has other names; what it lacks is known by its place being empty still.
        _check_complete(
            files.weights[part][0],
            part,
            module,
            None if files.template or part == "vae" else set(stored),
        )
        module.requires_grad_(False).eval()
    for part in files.tokenizers:
        if (words := len(getattr(pipe, part))) < 300:
            raise ModelError(
                f"The {part} of {files.path.name} knows only {words} words; its vocabulary is damaged. Download the model again."
            )
    _settle_schedule(pipe, base, files.path.name)
    return LoadedBase(family, pipe, files, reading)


def find_files(base: Base, report: hub.Report = lambda event: None) -> model_files.BaseFiles:
    """The checked files of a base and its VAE, downloaded where they are not on this machine."""
    wanted = [
        pattern
        for pattern in hub.MODEL_FILES
        if base.t5 or not pattern.startswith(model_files.T5_PARTS)
    ]
    files = model_files.inspect(
        model_files.locate(base) or hub.download(base.model, base.revision, wanted, report), base.t5
    )
    if base.vae:
        files = model_files.with_vae(
            files, model_files.locate_vae(base) or hub.download(base.vae, "", hub.VAE_FILES, report)
        )
    return files


def _load_pipeline(files: model_files.BaseFiles, family: ModelFamily, dtype: torch.dtype) -> Any:
    options = dict(family.pipeline_options) | dict.fromkeys(files.left_out)
    if files.template or files.weights["vae"][0].parent != files.path / "vae":
        options["vae"] = from_single_file.load_vae(files)
    if files.template:
        return from_single_file.load_pipeline(files, family.pipeline_class, options, dtype)
    return family.pipeline_class.from_pretrained(
        files.path,
        torch_dtype={"vae": torch.float32, "default": dtype},
        use_safetensors=True,
        variant=files.variant,
        local_files_only=True,
        **options,
    )


def _reading(
    base: Base, caption_tokens: int, files: model_files.BaseFiles, family: ModelFamily
) -> Reading:
    """Raises ModelError for settings that this base has no use for."""
    if base.clip_skip > 1 and not family.skips_layers:
        raise ModelError(
            f"base.clip_skip = {base.clip_skip} does not apply to {family.name}, which reads a fixed layer; set it to 1."
        )
    if base.clip_skip > (layers := files.configs["text_encoder"].get("num_hidden_layers", 12)):
        raise ModelError(
            f"base.clip_skip = {base.clip_skip} is more than the {layers} layers of {files.path.name}'s text encoder; set it to 1 or 2."
        )
    if caption_tokens > 75 and not family.reads_in_chunks:
        raise ModelError(
            f"dataset.caption_tokens = {caption_tokens} does not apply to {family.name}; set it to 75."
        )
    return Reading(base.clip_skip, caption_tokens // 75)


def _settle_schedule(pipe: Any, base: Base, name: str) -> None:
    """The noise schedule of the files, or of the settings where these say something. Training and sampling both follow it.

    With zero terminal SNR the steps of a sample are spaced from the last one ("trailing"), or its pure noise is never met
    (Lin et al. 2024, arXiv:2305.08891, section 3.3).
    """
    config = pipe.scheduler.config
    changes: dict[str, Any] = {}
    if base.prediction != "auto":
        changes["prediction_type"] = {"epsilon": "epsilon", "v": "v_prediction"}[base.prediction]
    if base.zero_terminal_snr != "auto":
        changes["rescale_betas_zero_snr"] = base.zero_terminal_snr == "on"
    if changes and not hasattr(pipe.scheduler, "alphas_cumprod"):
        raise ModelError(
            f"base.prediction and base.zero_terminal_snr do not apply to {name}, which is trained by flow matching; set both to auto."
        )
    settled = dict(config) | changes
    if settled.get("prediction_type", "") is None:
        raise ModelError(
            f"Nothing in {name} tells whether it predicts epsilon or v. "
            "Set base.prediction to v for a 768 pixel model of Stable Diffusion 2, else to epsilon."
        )
    if settled.get("rescale_betas_zero_snr"):
        if settled.get("prediction_type") == "epsilon":
            raise ModelError(
                f"{name} predicts epsilon, which zero terminal SNR rules out; set base.zero_terminal_snr = off, or base.prediction = v."
            )
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if any(config.get(key) != value for key, value in changes.items()):
        # DDIM's scheduler knows all of these; what samples are made with is chosen from its settings.
        pipe.scheduler = DDIMScheduler.from_config(config, **changes)


def _check_complete(weights: Path, part: str, module: nn.Module, stored: set[str] | None) -> None:
    """Loaders fill what a file lacks with random numbers, or leave it out, and say so only in a log."""
    place = f"The {part} in {weights.name}"
    state = module.state_dict()
    missing = [name for name, tensor in state.items() if tensor.is_meta]
    if stored is not None:
        stored = {name.removeprefix("text_model.") for name in stored}
        held = {
            tensor.data_ptr()
            for name, tensor in state.items()
            if name.removeprefix("text_model.") in stored
        }  # T5 has one twice
        unheld = (
            name
            for name, tensor in state.items()
            if tensor.data_ptr() not in held and not name.endswith("position_ids")
        )
        missing = list(dict.fromkeys([*missing, *unheld]))
    if missing:
        raise ModelError(
            f"{place} lacks {len(missing)} of {len(state)} tensors (such as {missing[0]}); the file is incomplete. Download it again."
        )
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ModelError(
                f"{place} holds numbers that are not finite (in {name}); the file is damaged. Download it again."
            )

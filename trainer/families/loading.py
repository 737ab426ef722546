"""Loads a base model of any family, and checks that it is complete, finite and consistent."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from trainer.config import Base
from trainer.errors import ModelError
from trainer.families import from_single_file
from trainer.families.base import PLAIN_READING, Conditioning, ModelFamily, Reading
from trainer.families.registry import family_of
from trainer.models import hub
from trainer.models.device import is_out_of_memory
from trainer.models.model_files import BaseFiles, inspect, locate, locate_vae
from trainer.models.pipelines import T5_PARTS
from trainer.models.replacement_vae import with_vae

MIN_VOCABULARY = 300  # CLIP has 49,408 tokens; a damaged vocabulary leaves only the special ones
LOADING_ERRORS = (ValueError, RuntimeError, OSError, KeyError, TypeError, AttributeError)
"""What diffusers and transformers raise if weights and configurations do not fit together."""


@dataclass(frozen=True)
class LoadedBase:
    """A base model on the CPU: frozen, and checked to be complete and finite."""

    family: ModelFamily
    pipe: Any
    """The diffusers pipeline."""
    files: BaseFiles
    reading: Reading = PLAIN_READING

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encodes prompts with the settings of this run; see `ModelFamily.encode_prompts`."""
        return self.family.encode_prompts(self.pipe, prompts, self.reading)

    @property
    def denoiser(self) -> nn.Module:
        """The UNet or transformer."""
        return self.family.denoiser(self.pipe)

    @property
    def components(self) -> dict[str, nn.Module]:
        """Every model that can have an adapter: {"unet": ..., "text_encoder": ...}."""
        text_encoders = self.family.text_encoders(self.pipe)
        return {self.family.denoiser_name: self.denoiser, **text_encoders}


def load_base(
    base: Base,
    dtype: torch.dtype,
    caption_tokens: int = 75,
    report: hub.Report = lambda event: None,
) -> LoadedBase:
    """Loads a base model onto the CPU, after downloading it if necessary.

    `caption_tokens` is a multiple of 75. The VAE stays in float32 for every dtype, because in fp16
    it can overflow, which gives black images.

    Raises ModelError if the model is missing, incomplete, damaged, or does not fit the settings.
    """
    files = find_files(base, report)
    family = family_of(files)
    reading = _reading(base, caption_tokens, files, family)
    try:
        pipe = _load_pipeline(files, family, dtype)
    except LOADING_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"The parts of the base model {files.path.name} do not fit together "
            f"({_loading_problem(error)}). Download it again."
        ) from None
    pipe.set_progress_bar_config(disable=True)

    for part in files.tensors:
        module = getattr(pipe, part)
        _check_complete(files, part, module)
        module.requires_grad_(False).eval()
    for part in files.tokenizers:
        _check_vocabulary(files, part, len(getattr(pipe, part)))
    _apply_schedule_settings(pipe, base, files.path.name)
    return LoadedBase(family, pipe, files, reading)


def find_files(base: Base, report: hub.Report = lambda event: None) -> BaseFiles:
    """Returns the checked files of a base and its VAE, after downloading missing ones."""
    patterns = hub.MODEL_FILES
    if not base.t5:
        patterns = [pattern for pattern in patterns if not pattern.startswith(T5_PARTS)]
    path = locate(base) or hub.download(base.model, base.revision, patterns, report)
    files = inspect(path, base.t5)
    if not base.vae:
        return files
    vae = locate_vae(base) or hub.download(base.vae, "", hub.VAE_FILES, report)
    return with_vae(files, vae)


def _load_pipeline(files: BaseFiles, family: ModelFamily, dtype: torch.dtype) -> Any:
    options = dict(family.pipeline_options) | dict.fromkeys(files.absent_parts)
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


def _loading_problem(error: Exception) -> str:
    """Returns a library's error in a few words."""
    if "meta tensor" in str(error):
        return "tensors are missing"
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _reading(base: Base, caption_tokens: int, files: BaseFiles, family: ModelFamily) -> Reading:
    """Returns how captions are read. Raises ModelError for settings that do not apply."""
    if base.clip_skip > 1 and not family.supports_clip_skip:
        raise ModelError(
            f"base.clip_skip = {base.clip_skip} does not apply to {family.name}, "
            "which always uses the same layer; set it to 1."
        )
    layers = files.configs["text_encoder"].get("num_hidden_layers", 12)
    if base.clip_skip > layers:
        raise ModelError(
            f"base.clip_skip = {base.clip_skip} is more than the {layers} layers of the text "
            f"encoder of {files.path.name}; set it to 1 or 2."
        )
    if caption_tokens > 75 and not family.supports_long_captions:
        raise ModelError(
            f"dataset.caption_tokens = {caption_tokens} does not apply to {family.name}; "
            "set it to 75."
        )
    return Reading(base.clip_skip, caption_tokens // 75)


def _apply_schedule_settings(pipe: Any, base: Base, name: str) -> None:
    """Replaces the scheduler if the settings change its noise schedule.

    Training and sampling both take the schedule from the pipeline. With zero terminal SNR the
    steps of a sample are counted from the last timestep ("trailing" spacing). Otherwise sampling
    would never start from the pure noise that the model was trained on (Lin et al. 2024,
    arXiv:2305.08891, section 3.3). `name` is the name of the base in messages.
    """
    config = pipe.scheduler.config
    changes = _schedule_changes(base)
    if changes and not hasattr(pipe.scheduler, "alphas_cumprod"):
        raise ModelError(
            f"base.prediction and base.zero_terminal_snr do not apply to {name}, "
            "which is trained by flow matching; set both to auto."
        )
    schedule = dict(config) | changes
    if schedule.get("prediction_type", "") is None:
        raise ModelError(
            f"Nothing in {name} determines whether it predicts epsilon or v. Set base.prediction "
            "to v for a 768 pixel model of Stable Diffusion 2, else to epsilon."
        )
    if schedule.get("rescale_betas_zero_snr"):
        if schedule.get("prediction_type") == "epsilon":
            raise ModelError(
                f"{name} predicts epsilon, which is impossible with zero terminal SNR; "
                "set base.zero_terminal_snr = off, or base.prediction = v."
            )
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if any(config.get(key) != value for key, value in changes.items()):
        # DDIMScheduler has all of these options. The sampler is created from its configuration.
        pipe.scheduler = DDIMScheduler.from_config(config, **changes)


def _schedule_changes(base: Base) -> dict[str, Any]:
    """Returns the options of a diffusers scheduler that the settings determine."""
    changes: dict[str, Any] = {}
    if base.prediction != "auto":
        changes["prediction_type"] = {"epsilon": "epsilon", "v": "v_prediction"}[base.prediction]
    if base.zero_terminal_snr != "auto":
        changes["rescale_betas_zero_snr"] = base.zero_terminal_snr == "on"
    return changes


def _check_vocabulary(files: BaseFiles, part: str, size: int) -> None:
    if size < MIN_VOCABULARY:
        raise ModelError(
            f"The {part} of {files.path.name} contains only {size} words; "
            "its vocabulary is damaged. Download the model again."
        )


def _check_complete(files: BaseFiles, part: str, module: nn.Module) -> None:
    """Raises ModelError if a component has missing tensors or numbers that are not finite.

    Loaders leave missing tensors out or fill them with random numbers, and only log it.
    """
    name = f"The {part} in {files.weights[part][0].name}"
    state = module.state_dict()
    missing = [tensor_name for tensor_name, tensor in state.items() if tensor.is_meta]
    # A single file has LDM names. Its missing tensors are found by being left on "meta".
    if not files.template and part != "vae":
        missing = list(dict.fromkeys([*missing, *_not_in_file(state, set(files.tensors[part]))]))
    if missing:
        raise ModelError(
            f"{name} lacks {len(missing)} of {len(state)} tensors (such as {missing[0]}); "
            "the file is incomplete. Download it again."
        )
    for tensor_name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ModelError(
                f"{name} contains numbers that are not finite (in {tensor_name}); "
                "the file is damaged. Download it again."
            )


def _not_in_file(state: dict[str, Tensor], stored: set[str]) -> list[str]:
    """Returns the loaded tensors that are not stored in the file, by any of their names.

    Tensors are compared by their memory, because T5 has one under two names. Files differ in
    whether they contain the level `text_model`.
    """
    stored = {name.removeprefix("text_model.") for name in stored}
    loaded = {
        tensor.data_ptr()
        for name, tensor in state.items()
        if name.removeprefix("text_model.") in stored
    }
    return [
        name
        for name, tensor in state.items()
        if tensor.data_ptr() not in loaded and not name.endswith("position_ids")
    ]

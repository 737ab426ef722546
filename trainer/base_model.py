"""Finds a base model and checks, before anything is loaded, that it is what it says.

Only names, JSON and tensor headers are read here; nothing of a model folder is ever executed.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from trainer.config import EMBEDDED, Base
from trainer.errors import ModelError
from trainer.safetensors_header import TensorInfo, read_header

EMBEDDED_FOLDER = Path(__file__).resolve().parent / "embedded" / "base"

Parts = dict[str, set[tuple[str, str]]]
"""What a model_index.json may name: (library, class) by component. Diffusers would import anything else it finds there."""
TOKENIZERS = {("transformers", "CLIPTokenizer"), ("transformers", "CLIPTokenizerFast")}
STABLE_DIFFUSION: Parts = {
    "unet": {("diffusers", "UNet2DConditionModel")},
    "vae": {("diffusers", "AutoencoderKL")},
    "text_encoder": {("transformers", "CLIPTextModel")},
    "tokenizer": TOKENIZERS,
}
PIPELINES: dict[str, Parts] = {
    "StableDiffusionPipeline": STABLE_DIFFUSION,
    "StableDiffusionXLPipeline": STABLE_DIFFUSION
    | {"text_encoder_2": {("transformers", "CLIPTextModelWithProjection")}, "tokenizer_2": TOKENIZERS},
}
ALL_PARTS = {"scheduler"}.union(*PIPELINES.values())
UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model", "text_encoder_2": "model"}
CODE_KEYS = ("auto_map", "_attn_implementation_internal", "attn_implementation", "_attn_implementation", "custom_pipelines")


@dataclass(frozen=True)
class BaseFiles:
    """The files of a base model that passed the checks."""

    path: Path
    pipeline: str
    """Class of the diffusers pipeline."""
    configs: dict[str, dict[str, Any]]
    """config.json of each component."""
    tensors: dict[str, dict[str, TensorInfo]]
    """Tensor name -> type and shape, by component."""
    weights: dict[str, Path]
    """The file that each component's tensors were read from; folders often hold several editions side by side."""
    variant: str | None
    """"fp16" where the weights are named *.fp16.safetensors."""

    @property
    def text_encoders(self) -> list[str]:
        return [part for part in self.tensors if part.startswith("text_encoder")]

    @property
    def tokenizers(self) -> list[str]:
        return [part for part in PIPELINES[self.pipeline] if part.startswith("tokenizer")]


def locate(base: Base) -> Path | None:
    """The folder of a base model on this machine; None for a Hugging Face model that is not downloaded yet."""
    if base.model == EMBEDDED:
        return EMBEDDED_FOLDER
    path = Path(base.model).expanduser()
    if path.exists() or not _is_hub_id(base.model):
        return path
    cached = try_to_load_from_cache(base.model, "model_index.json", revision=base.revision or None)
    return Path(cached).parent if isinstance(cached, str) else None


def _is_hub_id(model: str) -> bool:
    owner, slash, name = model.partition("/")
    return bool(slash and owner and name) and "/" not in name and not model.startswith((".", "~", "/")) and "\\" not in model


def inspect(folder: Path) -> BaseFiles:
    """Checks a model folder by names and headers. Raises ModelError that names what was found instead."""
    if folder.is_file():
        raise ModelError(f"{folder.name} is a single file; give the folder of a model in diffusers' layout (it has a model_index.json).")
    if not folder.is_dir():
        raise ModelError(f"There is no base model at {folder}.")
    index = _read_json(folder / "model_index.json")
    pipeline = str(index.get("_class_name"))
    if pipeline not in PIPELINES:
        raise ModelError(f"{folder.name} is a {pipeline[:80]}; adapters are trained on Stable Diffusion ({' or '.join(PIPELINES)}).")
    _check_other_parts(folder, index)
    configs, tensors, weights, variants = {}, {}, {}, set()
    for part, allowed in PIPELINES[pipeline].items():
        entry = index.get(part)
        if not isinstance(entry, list) or tuple(entry) not in allowed:
            wanted = " or ".join(name for _, name in sorted(allowed))
            raise ModelError(
                f"{folder.name}/model_index.json names {str(entry)[:80]} as {part}; "
                f"it must be {wanted}. The file is damaged or not to be trusted."
            )
        if part in WEIGHTS:
            configs[part] = _read_json(folder / part / "config.json")
            weights[part], variant = _find_weights(folder / part, WEIGHTS[part])
            tensors[part] = read_header(weights[part]).tensors
            variants.add(variant)
        else:
            _check_tokenizer(folder / part)
    channels = configs["unet"].get("in_channels")
    if channels != 4:
        raise ModelError(
            f"{folder.name} has a UNet with {channels} input channels (an inpainting or depth model); "
            "train on the ordinary model of the same family."
        )
    if configs["vae"].get("latents_mean"):
        raise ModelError(f"{folder.name} has a VAE that shifts its latents (latents_mean); no Stable Diffusion trained here does.")
    return BaseFiles(folder, pipeline, configs, tensors, weights, variants.pop() if len(variants) == 1 else None)


def _check_other_parts(folder: Path, index: dict[str, Any]) -> None:
    """Only what a Stable Diffusion folder has beside its models; the unused ones are never loaded."""
    library, name = entry if isinstance(entry := index.get("scheduler"), list) and len(entry) == 2 else (None, "")
    if library != "diffusers" or not re.fullmatch(r"[A-Za-z]+Scheduler", str(name)):
        raise ModelError(f"{folder.name}/model_index.json names {str(entry)[:80]} as scheduler; the file is damaged or not to be trusted.")
    for part, entry in index.items():
        if isinstance(entry, list) and entry != [None, None] and part not in {*PIPELINES[index["_class_name"]], "scheduler", *UNUSED_PARTS}:
            raise ModelError(
                f"{folder.name}/model_index.json names {part[:80]}, a part that no {index['_class_name']} has; "
                "the file is damaged or not to be trusted."
            )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(f"{path.parent.name}/{path.name} is missing; the model folder is incomplete. Download it again.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ModelError(f"{path.parent.name}/{path.name} is not valid JSON; the model folder is damaged. Download it again.") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path.parent.name}/{path.name} is not a table of settings; the model folder is damaged.")
    code = [key for key in CODE_KEYS if data.get(key)]
    if code:
        raise ModelError(
            f"{path.parent.name}/{path.name} asks to run code of its own ({code[0]}), which is never done. Use a model without it."
        )
    return data


def _find_weights(folder: Path, stem: str) -> tuple[Path, str | None]:
    for variant in (None, "fp16"):
        name = f"{stem}.safetensors" if variant is None else f"{stem}.{variant}.safetensors"
        if (folder / name).is_file():
            return folder / name, variant
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".ckpt", ".pt"))
    if others:
        raise ModelError(
            f"{folder.name} has only {others[0]}, a pickle file, which can run code when opened; convert the model to .safetensors first."
        )
    raise ModelError(f"The weights {folder.name}/{stem}.safetensors are missing; the model folder is incomplete. Download it again.")


def _check_tokenizer(folder: Path) -> None:
    if not (folder / "tokenizer.json").is_file() and not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
        raise ModelError(
            "The tokenizer has no vocabulary (vocab.json and merges.txt, or tokenizer.json); "
            "every caption would be read as empty. Download the model again."
        )
    for name in ("tokenizer_config.json", "tokenizer.json", "vocab.json"):
        if (folder / name).is_file():
            _read_json(folder / name)

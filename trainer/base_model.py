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
    "StableDiffusion3Pipeline": {
        "transformer": {("diffusers", "SD3Transformer2DModel")},
        "vae": {("diffusers", "AutoencoderKL")},
        "text_encoder": {("transformers", "CLIPTextModelWithProjection")},
        "tokenizer": TOKENIZERS,
        "text_encoder_2": {("transformers", "CLIPTextModelWithProjection")},
        "tokenizer_2": TOKENIZERS,
        "text_encoder_3": {("transformers", "T5EncoderModel")},
        "tokenizer_3": {("transformers", "T5TokenizerFast"), ("transformers", "T5Tokenizer")},
    },
}
ALL_PARTS = {"scheduler"}.union(*PIPELINES.values())
T5_PARTS = ("text_encoder_3", "tokenizer_3")  # a Stable Diffusion 3 also works without them
UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")
DENOISERS = {"unet": "UNet", "transformer": "transformer"}
WEIGHTS = dict.fromkeys((*DENOISERS, "vae"), "diffusion_pytorch_model") | dict.fromkeys(
    ("text_encoder", "text_encoder_2", "text_encoder_3"), "model"
)
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
    weights: dict[str, list[Path]]
    """The file that each component's tensors were read from, several where it is cut into parts; folders often hold several editions."""
    variant: str | None
    """"fp16" where the weights are named *.fp16.safetensors."""

    @property
    def denoiser(self) -> str:
        """Name of the component that takes the noise away."""
        return next(part for part in DENOISERS if part in self.tensors)

    @property
    def text_encoders(self) -> list[str]:
        return [part for part in self.tensors if part.startswith("text_encoder")]

    @property
    def trainable_text_encoders(self) -> list[str]:
        """T5 is never trained: it is larger than all the rest together."""
        return [part for part in self.text_encoders if part not in T5_PARTS]

    @property
    def tokenizers(self) -> list[str]:
        return [part for part in PIPELINES[self.pipeline] if part.startswith("tokenizer") and part not in self.left_out]

    @property
    def left_out(self) -> list[str]:
        """Parts that the pipeline has and this model does without."""
        return [part for part in T5_PARTS if part in PIPELINES[self.pipeline] and "text_encoder_3" not in self.tensors]


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


def inspect(folder: Path, t5: bool = True) -> BaseFiles:
    """Checks a model folder by names and headers, without its T5 if so asked. Raises ModelError that names what was found instead."""
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
        if part in T5_PARTS and (not t5 or index.get("text_encoder_3") in (None, [None, None])):
            continue
        if not isinstance(entry, list) or tuple(entry) not in allowed:
            wanted = " or ".join(name for _, name in sorted(allowed))
            raise ModelError(
                f"{folder.name}/model_index.json names {str(entry)[:80]} as {part}; "
                f"it must be {wanted}. The file is damaged or not to be trusted."
            )
        if part in T5_PARTS and not (folder / part).is_dir():
            raise ModelError(f"{folder.name} lacks its {part} (T5). Download it, or train without T5: set base.t5 to false.")
        if part in WEIGHTS:
            configs[part] = _read_json(folder / part / "config.json")
            weights[part], variant = _find_weights(folder / part, WEIGHTS[part])
            tensors[part] = {name: info for path in weights[part] for name, info in read_header(path).tensors.items()}
            variants.add(variant)
        else:
            _check_tokenizer(folder / part)
    files = BaseFiles(folder, pipeline, configs, tensors, weights, variants.pop() if len(variants) == 1 else None)
    channels, latents = configs[files.denoiser].get("in_channels"), configs["vae"].get("latent_channels", 4)
    if channels != latents:
        raise ModelError(
            f"{folder.name} has a {DENOISERS[files.denoiser]} with {channels} input channels for latents of {latents} "
            "(an inpainting or depth model); train on the ordinary model of the same family."
        )
    if configs["vae"].get("latents_mean"):
        raise ModelError(f"{folder.name} has a VAE that shifts its latents (latents_mean); no Stable Diffusion trained here does.")
    return files


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


def _find_weights(folder: Path, stem: str) -> tuple[list[Path], str | None]:
    """The whole file, or all the parts that its index names, in the first edition that is there."""
    for variant in (None, "fp16"):
        named, index = (stem, "index") if variant is None else (f"{stem}.{variant}", f"index.{variant}")
        if (folder / f"{named}.safetensors").is_file():
            return [folder / f"{named}.safetensors"], variant
        if (folder / f"{stem}.safetensors.{index}.json").is_file():
            return _find_parts(folder, named, f"{stem}.safetensors.{index}.json"), variant
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".ckpt", ".pt"))
    if others:
        raise ModelError(
            f"{folder.name} has only {others[0]}, a pickle file, which can run code when opened; convert the model to .safetensors first."
        )
    raise ModelError(f"The weights {folder.name}/{stem}.safetensors are missing; the model folder is incomplete. Download it again.")


def _find_parts(folder: Path, named: str, index: str) -> list[Path]:
    placed = _read_json(folder / index).get("weight_map")
    names = sorted(set(map(str, placed.values()))) if isinstance(placed, dict) else []
    strange = [name for name in names if not re.fullmatch(re.escape(named) + r"-\d{5}-of-\d{5}\.safetensors", name)]
    if not names or strange:
        found = f"names {strange[0][:80]}" if strange else "names no file"
        raise ModelError(f"{folder.name}/{index} {found}; it is damaged or not to be trusted. Download the model again.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"The weights {folder.name}/{missing[0]} are missing; the model folder is incomplete. Download it again.")
    return [folder / name for name in names]


def _check_tokenizer(folder: Path) -> None:
    if not (folder / "tokenizer.json").is_file() and not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
        raise ModelError(
            "The tokenizer has no vocabulary (vocab.json and merges.txt, or tokenizer.json); "
            "every caption would be read as empty. Download the model again."
        )
    for name in ("tokenizer_config.json", "tokenizer.json", "vocab.json"):
        if (folder / name).is_file():
            _read_json(folder / name)

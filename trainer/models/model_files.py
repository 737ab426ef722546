"""Finds a base model and checks, before anything is loaded, that it is what it says.

Only names, JSON and tensor headers are read here; nothing of a model folder is ever executed.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from trainer.config import EMBEDDED, Base
from trainer.errors import ModelError
from trainer.models.safetensors_header import TensorInfo, read_header
from trainer.models.single_file import PICKLES, VAE, read_checkpoint, vae_config, what_it_is

EMBEDDED_FOLDER = Path(__file__).resolve().parents[1] / "embedded" / "base"

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
    | {
        "text_encoder_2": {("transformers", "CLIPTextModelWithProjection")},
        "tokenizer_2": TOKENIZERS,
    },
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
VAE_DEFAULTS = {"latent_channels": 4, "scaling_factor": 0.18215}  # AutoencoderKL's own
CODE_KEYS = (
    "auto_map",
    "_attn_implementation_internal",
    "attn_implementation",
    "_attn_implementation",
    "custom_pipelines",
)


@dataclass(frozen=True)
class BaseFiles:
    """The files of a base model that passed the checks."""

    path: Path
    """A folder in diffusers' layout, or a single .safetensors file."""
    pipeline: str
    """Class of the diffusers pipeline."""
    configs: dict[str, dict[str, Any]]
    """config.json of each component, and of the scheduler; worked out from the tensors' shapes where the file has none."""
    tensors: dict[str, dict[str, TensorInfo]]
    """Tensor name -> type and shape, by component."""
    weights: dict[str, list[Path]]
    """The file that each component's tensors were read from, several where it is cut into parts; folders often hold several editions."""
    variant: str | None = None
    """"fp16" where a folder's weights are named *.fp16.safetensors."""
    template: str | None = None
    """Name of the shipped configurations a single file is loaded with; None for a folder."""
    notes: tuple[str, ...] = ()
    """What is odd about it, in whole sentences."""

    @property
    def denoiser(self) -> str:
        """Name of the component that takes the noise away."""
        return next(part for part in DENOISERS if part in self.tensors)

    @property
    def text_encoders(self) -> list[str]:
        return [part for part in self.tensors if part.startswith("text_encoder")]

    @property
    def trainable_text_encoders(self) -> list[str]:
        """Those of CLIP. T5 is never trained: it is larger than all the rest together."""
        return [
            part
            for part in self.text_encoders
            if all(name.startswith("CLIP") for _, name in PIPELINES[self.pipeline][part])
        ]

    @property
    def tokenizers(self) -> list[str]:
        return [
            part
            for part in PIPELINES[self.pipeline]
            if part.startswith("tokenizer") and part not in self.left_out
        ]

    @property
    def left_out(self) -> list[str]:
        """Parts that the pipeline has and this model does without."""
        return [
            part
            for part in T5_PARTS
            if part in PIPELINES[self.pipeline] and "text_encoder_3" not in self.tensors
        ]


def locate(base: Base) -> Path | None:
    """The folder of a base model on this machine; None for a Hugging Face model that is not downloaded yet."""
    if base.model == EMBEDDED:
        return EMBEDDED_FOLDER
    folder = _on_this_machine(base.model, "model_index.json", base.revision)
    if (
        folder is not None
        and base.t5
        and is_hub_id(base.model)
        and not Path(base.model).expanduser().exists()
    ):
        has_t5 = _read_json(folder / "model_index.json").get("text_encoder_3") not in (
            None,
            [None, None],
        )
        if has_t5 and not (folder / "text_encoder_3").is_dir():
            return None  # downloaded without T5, which is wanted now
    return folder


def locate_vae(base: Base) -> Path | None:
    """The folder or file of `base.vae` on this machine; None where it is not downloaded yet."""
    return _on_this_machine(base.vae, "config.json")


def _on_this_machine(model: str, file: str, revision: str = "") -> Path | None:
    path = Path(model).expanduser()
    if path.exists() or not is_hub_id(model):
        return path
    cached = try_to_load_from_cache(model, file, revision=revision or None)
    return Path(cached).parent if isinstance(cached, str) else None


def is_hub_id(model: str) -> bool:
    owner, slash, name = model.partition("/")
    return (
        bool(slash and owner and name)
        and "/" not in name
        and not model.startswith((".", "~", "/"))
        and "\\" not in model
    )


def inspect(folder: Path, t5: bool = True) -> BaseFiles:
    """Checks a base model by names and headers, without its T5 if so asked. Raises ModelError that names what was found instead."""
    if folder.is_file():
        found = read_checkpoint(folder)
        weights = {part: [folder] for part in found.tensors}
        return BaseFiles(
            folder,
            found.pipeline,
            found.configs,
            found.tensors,
            weights,
            template=found.template,
            notes=found.notes,
        )
    if not folder.is_dir():
        raise ModelError(f"There is no base model at {folder}.")
    index = _read_json(folder / "model_index.json")
    pipeline = str(index.get("_class_name"))
    if pipeline not in PIPELINES:
        raise ModelError(
            f"{folder.name} is a {pipeline[:80]}; adapters are trained on Stable Diffusion ({' or '.join(PIPELINES)})."
        )
    _check_other_parts(folder, index)
    configs = {"scheduler": _read_json(folder / "scheduler" / "scheduler_config.json")}
    editions: dict[str, dict[str | None, list[Path]]] = {}
    for part, allowed in PIPELINES[pipeline].items():
        entry = index.get(part)
        if part in T5_PARTS and (not t5 or index.get("text_encoder_3") in (None, [None, None])):
            continue
        if entry not in [list(names) for names in allowed]:
            wanted = " or ".join(name for _, name in sorted(allowed))
            raise ModelError(
                f"{folder.name}/model_index.json names {str(entry)[:80]} as {part}; "
                f"it must be {wanted}. The file is damaged or not to be trusted."
            )
        if part in T5_PARTS and not (folder / part).is_dir():
            raise ModelError(
                f"{folder.name} lacks its {part} (T5). Download it, or train without T5: set base.t5 to false."
            )
        if part in WEIGHTS:
            configs[part] = _read_json(folder / part / "config.json")
            editions[part] = _find_weights(folder / part, WEIGHTS[part])
        else:
            _check_tokenizer(folder / part)
    # Diffusers takes the fp16 edition of every part that has one, where it is asked for one at all.
    variant = None if all(None in found for found in editions.values()) else "fp16"
    weights = {
        part: found[variant] if variant in found else found[None]
        for part, found in editions.items()
    }
    tensors = {
        part: {name: info for path in paths for name, info in read_header(path).tensors.items()}
        for part, paths in weights.items()
    }
    files = BaseFiles(folder, pipeline, configs, tensors, weights, variant)
    channels, latents = (
        configs[files.denoiser].get("in_channels"),
        configs["vae"].get("latent_channels", 4),
    )
    if channels != latents:
        raise ModelError(
            f"{folder.name} has a {DENOISERS[files.denoiser]} with {channels} input channels for latents of {latents} "
            "(an inpainting or depth model); train on the ordinary model of the same family."
        )
    if configs["vae"].get("latents_mean"):
        raise ModelError(
            f"{folder.name} has a VAE that shifts its latents (latents_mean); no Stable Diffusion trained here does."
        )
    return files


def with_vae(files: BaseFiles, path: Path) -> BaseFiles:
    """The same base with the VAE of a diffusers folder or a single file. Raises ModelError for one that does not fit the base."""
    own = files.configs["vae"]
    if path.is_dir():
        folder = path if (path / "config.json").is_file() else path / "vae"
        config = _read_json(folder / "config.json")
        weights = next(iter(_find_weights(folder, WEIGHTS["vae"]).values()))
        tensors = {
            name: info for path in weights for name, info in read_header(path).tensors.items()
        }
        if config.get("_class_name") != "AutoencoderKL":
            raise ModelError(
                f"{path.name} is a {str(config.get('_class_name'))[:80]}; base.vae must be an AutoencoderKL like the base's."
            )
    else:
        weights, tensors = [path], _vae_tensors(path)
        try:
            config = vae_config(tensors, own)
        except (KeyError, IndexError, ValueError):
            raise ModelError(
                f"{path.name} is no whole VAE; give a VAE as a diffusers folder or a .safetensors file as base.vae."
            ) from None
    for key, words in {
        "latent_channels": "latent channels",
        "scaling_factor": "as its scaling factor",
    }.items():
        if config.get(key, VAE_DEFAULTS[key]) != own.get(key, VAE_DEFAULTS[key]):
            raise ModelError(
                f"The VAE {path.name} has {config.get(key)} {words} and that of {files.path.name} has {own.get(key, VAE_DEFAULTS[key])}; "
                "it belongs to another family. Use a VAE made for this base."
            )
    for name, part in ((path.name, config), (files.path.name, own)):
        if not isinstance(part.get("block_out_channels"), list):
            raise ModelError(
                f"The VAE of {name} does not say its block_out_channels; its config.json is damaged. Download it again."
            )
    if len(config["block_out_channels"]) != len(own["block_out_channels"]):
        raise ModelError(
            f"The VAE {path.name} shrinks pictures by another factor than that of {files.path.name}; use one made for this base."
        )
    return replace(
        files,
        configs=files.configs | {"vae": config},
        tensors=files.tensors | {"vae": tensors},
        weights=files.weights | {"vae": weights},
    )


def _vae_tensors(path: Path) -> dict[str, TensorInfo]:
    """Of a VAE in a file of its own, under LDM names; those of a whole checkpoint's VAE begin with first_stage_model."""
    if not path.is_file():
        raise ModelError(f"There is no VAE at {path}.")
    if path.suffix.lower() in PICKLES:
        raise ModelError(
            f"{path.name} is a pickle file, which can run code when opened; convert it to .safetensors first."
        )
    tensors = read_header(path).tensors
    if any(name.startswith(VAE) for name in tensors):
        return {
            name.removeprefix(VAE): info for name, info in tensors.items() if name.startswith(VAE)
        }
    if not {
        "encoder.conv_in.weight",
        "decoder.conv_in.weight",
        "encoder.down.0.block.0.conv1.weight",
    } <= set(tensors):
        raise ModelError(
            f"{path.name} is {what_it_is(tensors)}; base.vae takes a VAE with Stability's tensor names, or a diffusers folder."
        )
    return tensors


def _check_other_parts(folder: Path, index: dict[str, Any]) -> None:
    """Only what a Stable Diffusion folder has beside its models; the unused ones are never loaded."""
    library, name = (
        entry
        if isinstance(entry := index.get("scheduler"), list) and len(entry) == 2
        else (None, "")
    )
    if library != "diffusers" or not re.fullmatch(r"[A-Za-z]+Scheduler", str(name)):
        raise ModelError(
            f"{folder.name}/model_index.json names {str(entry)[:80]} as scheduler; the file is damaged or not to be trusted."
        )
    for part, entry in index.items():
        if (
            isinstance(entry, list)
            and entry != [None, None]
            and part not in {*PIPELINES[index["_class_name"]], "scheduler", *UNUSED_PARTS}
        ):
            raise ModelError(
                f"{folder.name}/model_index.json names {part[:80]}, a part that no {index['_class_name']} has; "
                "the file is damaged or not to be trusted."
            )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(
            f"{path.parent.name}/{path.name} is missing; the model folder is incomplete. Download it again."
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ModelError(
            f"{path.parent.name}/{path.name} is not valid JSON; the model folder is damaged. Download it again."
        ) from None
    if not isinstance(data, dict):
        raise ModelError(
            f"{path.parent.name}/{path.name} is not a table of settings; the model folder is damaged."
        )
    code = [key for key in CODE_KEYS if data.get(key)]
    if code:
        raise ModelError(
            f"{path.parent.name}/{path.name} asks to run code of its own ({code[0]}), which is never done. Use a model without it."
        )
    return data


def _find_weights(folder: Path, stem: str) -> dict[str | None, list[Path]]:
    """The whole file, or all the parts that its index names, by edition. Never empty."""
    found: dict[str | None, list[Path]] = {}
    for variant in (None, "fp16"):
        named, index = (
            (stem, "index") if variant is None else (f"{stem}.{variant}", f"index.{variant}")
        )
        if (folder / f"{named}.safetensors").is_file():
            found[variant] = [folder / f"{named}.safetensors"]
        elif (folder / f"{stem}.safetensors.{index}.json").is_file():
            found[variant] = _find_parts(folder, named, f"{stem}.safetensors.{index}.json")
    if found:
        return found
    others = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".bin", ".ckpt", ".pt")
    )
    if others:
        raise ModelError(
            f"{folder.name} has only {others[0]}, a pickle file, which can run code when opened; convert the model to .safetensors first."
        )
    raise ModelError(
        f"The weights {folder.name}/{stem}.safetensors are missing; the model folder is incomplete. Download it again."
    )


def _find_parts(folder: Path, named: str, index: str) -> list[Path]:
    placed = _read_json(folder / index).get("weight_map")
    names = sorted(set(map(str, placed.values()))) if isinstance(placed, dict) else []
    strange = [
        name
        for name in names
        if not re.fullmatch(re.escape(named) + r"-\d{5}-of-\d{5}\.safetensors", name)
    ]
    if not names or strange:
        found = f"names {strange[0][:80]}" if strange else "names no file"
        raise ModelError(
            f"{folder.name}/{index} {found}; it is damaged or not to be trusted. Download the model again."
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"The weights {folder.name}/{missing[0]} are missing; the model folder is incomplete. Download it again."
        )
    return [folder / name for name in names]


def _check_tokenizer(folder: Path) -> None:
    if not (folder / "tokenizer.json").is_file() and not (
        (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    ):
        raise ModelError(
            "The tokenizer has no vocabulary (vocab.json and merges.txt, or tokenizer.json); "
            "every caption would be read as empty. Download the model again."
        )
    for name in ("tokenizer_config.json", "tokenizer.json", "vocab.json"):
        if (folder / name).is_file():
            _read_json(folder / name)

"""Replaces the VAE of a base model by the one that `base.vae` names."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from trainer.errors import ModelError
from trainer.models.diffusers_folder import find_weights, read_json, read_tensors
from trainer.models.model_files import BaseFiles
from trainer.models.pipelines import WEIGHTS
from trainer.models.safetensors_header import TensorInfo, read_header
from trainer.models.single_file import PICKLES, VAE, describe_kind, vae_config

DEFAULTS = {"latent_channels": 4, "scaling_factor": 0.18215}  # AutoencoderKL's own
LDM_TENSORS = {
    "encoder.conv_in.weight",
    "decoder.conv_in.weight",
    "encoder.down.0.block.0.conv1.weight",
}
"""Tensors that every VAE with LDM names has."""


class VaeFiles(NamedTuple):
    """The configuration, tensors and files of a VAE."""

    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    weights: list[Path]


def with_vae(files: BaseFiles, path: Path) -> BaseFiles:
    """Returns the same base with the VAE of a diffusers folder or a single file.

    Raises ModelError if the path contains anything else, or a VAE for another family.
    """
    own = files.configs["vae"]
    vae = _read_folder(path) if path.is_dir() else _read_file(path, own)
    _check_fits(path.name, vae.config, files.path.name, own)
    return replace(
        files,
        configs=files.configs | {"vae": vae.config},
        tensors=files.tensors | {"vae": vae.tensors},
        weights=files.weights | {"vae": vae.weights},
    )


def _read_folder(path: Path) -> VaeFiles:
    """Reads the folder of a VAE, or the folder of a whole model that contains one."""
    folder = path if (path / "config.json").is_file() else path / "vae"
    config = read_json(folder / "config.json")
    weights = next(iter(find_weights(folder, WEIGHTS["vae"]).values()))
    tensors = read_tensors(weights)
    if config.get("_class_name") != "AutoencoderKL":
        raise ModelError(
            f"{path.name} is a {str(config.get('_class_name'))[:80]}; "
            "base.vae must be an AutoencoderKL, like the VAE of the base."
        )
    return VaeFiles(config, tensors, weights)


def _read_file(path: Path, template: dict[str, Any]) -> VaeFiles:
    tensors = _read_ldm_tensors(path)
    try:
        config = vae_config(tensors, template)
    except (KeyError, IndexError, ValueError):
        raise ModelError(
            f"{path.name} is not a whole VAE; "
            "give a VAE as a diffusers folder or a .safetensors file as base.vae."
        ) from None
    return VaeFiles(config, tensors, [path])


def _read_ldm_tensors(path: Path) -> dict[str, TensorInfo]:
    """Returns the tensors of a VAE under LDM names, from a VAE file or a whole model's file."""
    if not path.is_file():
        raise ModelError(f"There is no VAE at {path}.")
    if path.suffix.lower() in PICKLES:
        raise ModelError(
            f"{path.name} is a pickle file, which can run code when opened; "
            "convert it to .safetensors first."
        )
    tensors = read_header(path).tensors
    inside_model = {
        name.removeprefix(VAE): info for name, info in tensors.items() if name.startswith(VAE)
    }
    if inside_model:
        return inside_model
    if not set(tensors) >= LDM_TENSORS:
        raise ModelError(
            f"{path.name} is {describe_kind(tensors)}; "
            "base.vae takes a VAE with Stability's tensor names, or a diffusers folder."
        )
    return tensors


def _check_fits(name: str, vae: dict[str, Any], base: str, own: dict[str, Any]) -> None:
    """Raises ModelError unless the VAE called `name` can replace the own VAE of `base`."""
    for key, default in DEFAULTS.items():
        value, expected = vae.get(key, default), own.get(key, default)
        if value != expected:
            raise ModelError(
                f"The VAE {name} has {key} = {value} and the VAE of {base} has {expected}; "
                "it belongs to another family. Use a VAE made for this base."
            )
    for model, config in ((name, vae), (base, own)):
        if not isinstance(config.get("block_out_channels"), list):
            raise ModelError(
                f"The config.json of the VAE of {model} has no block_out_channels; "
                "it is damaged. Download it again."
            )
    if len(vae["block_out_channels"]) != len(own["block_out_channels"]):
        raise ModelError(
            f"The VAE {name} scales images down by another factor than the VAE of {base}; "
            "use one made for this base."
        )

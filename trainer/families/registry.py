"""The table of model families, and the choice of the family of a base model or an adapter."""

from collections.abc import Callable, Collection

from trainer.errors import ModelError
from trainer.families.base import ModelFamily
from trainer.families.sd1 import StableDiffusion1
from trainer.families.sd2 import StableDiffusion2
from trainer.families.sd3 import StableDiffusion3
from trainer.families.sdxl import StableDiffusionXL
from trainer.lora.formats.reader import AdapterFile
from trainer.models.model_files import BaseFiles
from trainer.models.pipelines import DENOISERS

FAMILIES: dict[str, ModelFamily] = {
    "sd1": StableDiffusion1(),
    "sd2": StableDiffusion2(),
    "sdxl": StableDiffusionXL(),
    "sd3m": StableDiffusion3("3m"),
    "sd35m": StableDiffusion3("35m"),
    "sd35l": StableDiffusion3("35l"),
}
"""Every family by its short name, which the embedded base and tests use."""


def family_of(files: BaseFiles) -> ModelFamily:
    """Returns the family of a base model. Raises ModelError if it belongs to none."""
    for family in FAMILIES.values():
        if family.matches_base(files):
            return family
    families = ", ".join(family.name for family in FAMILIES.values())
    raise ModelError(
        f"{files.path.name} is a {files.pipeline} with an unusual {DENOISERS[files.denoiser]}, "
        f"which cannot be trained. Use a base of one of these families: {families}."
    )


def families_of_adapter(file: AdapterFile) -> list[str]:
    """Returns the names of the families that an adapter may have been trained for.

    The text width of its cross-attention is decisive, then its metadata, then the layers that it
    changes. The list is empty if the file determines none. It contains the architecture as written
    in the metadata if that is not a family of this program.
    """
    widths = _text_widths(file)
    architectures = _architectures(file)
    paths = {f"{module.component}.{module.name}" for module in file.modules}
    return (
        _names(lambda family: family.text_width in widths)
        or _names(lambda family: _starts(architectures, family.metadata_prefixes))
        or _names(lambda family: family.matches_adapter_keys(paths))
        or architectures[:1]
    )


def _names(matches: Callable[[ModelFamily], bool]) -> list[str]:
    return [family.name for family in FAMILIES.values() if matches(family)]


def _starts(architectures: Collection[str], prefixes: tuple[str, ...]) -> bool:
    return any(architecture.startswith(prefixes) for architecture in architectures)


def _text_widths(file: AdapterFile) -> set[int]:
    """Returns the input widths of the cross-attention keys that the adapter changes."""
    return {
        module.to("meta").delta.shape[1]  # on "meta" only shapes are computed
        for module in file.modules
        if module.component == "unet" and module.name.endswith("attn2.to_k")
    }


def _architectures(file: AdapterFile) -> list[str]:
    """Returns the architectures that the metadata of a file names."""
    keys = ("modelspec.architecture", "ss_base_model_version")
    return [file.metadata[key] for key in keys if file.metadata.get(key)]

"""The model families, and everything that is the same for all of them.

A family is one module (`sd1`, `sd2`, `sdxl`, `sd3`) and a row in `registry`. `base` is the contract
of a family, `latent_diffusion` what the UNet families share, `loading` loads a base model of any
family. Code outside this folder imports only the names below, `base` and `objective`. Imports
`trainer.config`, `trainer.models` and the file formats of adapters (`trainer.lora.formats`).
"""

from trainer.families.loading import LoadedBase, find_files, load_base
from trainer.families.registry import FAMILIES, families_of_adapter, family_of

__all__ = [
    "FAMILIES",
    "LoadedBase",
    "families_of_adapter",
    "family_of",
    "find_files",
    "load_base",
]

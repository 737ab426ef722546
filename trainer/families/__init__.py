"""The model families, one file each, and everything that is the same for all of them.

`base` is the contract of a family, `registry` the table of families, and `loading` loads a base
model of any family. Code outside this folder imports only the names below, `base` and `objective`.
Imports `trainer.models` and the file formats of adapters (`trainer.lora.formats`).
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

"""The settings of a run: declared, checked, read from files and written to them.

`settings/` declares every field, a module per section. `rules` checks several fields together,
`parsers` reads lists written as text, `schema` lists the fields by path, and `io` reads and writes
TOML and computes the fingerprint. This folder is the bottom of the engine: it imports only
`trainer.errors`, and never torch.
"""

from trainer.config.io import fingerprint, from_dict, load, parse, parse_setting, replace, to_toml
from trainer.config.parsers import folder_repeats, numbers_by_name, optimizer_arguments
from trainer.config.schema import choices, fields, get, several_choices, value_error
from trainer.config.settings import (
    EMBEDDED,
    Adapter,
    Base,
    Dataset,
    Objective,
    RunConfig,
    Sampling,
    Saving,
    Section,
    Training,
)

__all__ = [
    "EMBEDDED",
    "Adapter",
    "Base",
    "Dataset",
    "Objective",
    "RunConfig",
    "Sampling",
    "Saving",
    "Section",
    "Training",
    "choices",
    "fields",
    "fingerprint",
    "folder_repeats",
    "from_dict",
    "get",
    "load",
    "numbers_by_name",
    "optimizer_arguments",
    "parse",
    "parse_setting",
    "replace",
    "several_choices",
    "to_toml",
    "value_error",
]

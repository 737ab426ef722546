"""Every knob of a run, each declared once: type, bounds, default and help in one field.

The form on the page, `--set` on the command line, the presets, the docs and the metadata of the
finished file are generated from here. The docstring under a field is its help everywhere.
A config holds no derived value, no code path and no tensor; `load(save(config)) == config`.
"""

from typing import Annotated

from pydantic import Field, model_validator

from trainer.config import rules
from trainer.config.settings.adapter import Adapter
from trainer.config.settings.base import Base
from trainer.config.settings.dataset import Dataset
from trainer.config.settings.objective import Objective
from trainer.config.settings.sampling import Sampling
from trainer.config.settings.saving import Saving
from trainer.config.settings.section import EMBEDDED, Section
from trainer.config.settings.training import Training


class RunConfig(Section):
    """All settings of one run."""

    name: Annotated[str, Field(min_length=1, max_length=80)] = "my-lora"
    """Name of the adapter, and of its file."""
    preset: str = ""
    """The recipe this started from."""
    base: Base = Base()
    dataset: Dataset = Dataset()
    adapter: Adapter = Adapter()
    training: Training = Training()
    objective: Objective = Objective()
    sampling: Sampling = Sampling()
    saving: Saving = Saving()

    @model_validator(mode="after")
    def _contradictions(self) -> "RunConfig":
        rules.check(self)
        return self


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
]

"""Every setting of a run, declared once: type, default, label, bounds and help in one field.

The form on the page, `--set` on the command line, the presets, the docs and the metadata of the
finished file are generated from these fields. The `title` of a field is its label on the page, and
the docstring below it is its help. One module per section, named after it. A field contains no
value that can be computed from others, no code and no tensor.
"""

from typing import Self

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


class RunConfig(Section):
    """All settings of one run."""

    name: str = Field(default="my-lora", title="LoRA name", min_length=1, max_length=80)
    """Name of the adapter and of its file."""

    preset: str = Field(default="", title="Preset")
    """The preset with which the form was filled."""

    base: Base = Base()
    dataset: Dataset = Dataset()
    adapter: Adapter = Adapter()
    training: Training = Training()
    objective: Objective = Objective()
    sampling: Sampling = Sampling()
    saving: Saving = Saving()

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        """Raises ValueError if settings contradict each other."""
        if conflict := rules.first_conflict(self):
            raise ValueError(conflict)
        return self

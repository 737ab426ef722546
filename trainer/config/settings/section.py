"""What all sections of the settings have in common."""

from typing import Any

from pydantic import BaseModel, ConfigDict

EMBEDDED = "embedded"
"""The name of the base model that ships with the program."""


class Section(BaseModel):
    """A table of settings. Each field has a title (its label) and a docstring (its help)."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Joins the lines of each help into one text, for the page, `--help` and run.toml."""
        super().__pydantic_init_subclass__(**kwargs)
        for field in cls.model_fields.values():
            field.description = " ".join((field.description or "").split())

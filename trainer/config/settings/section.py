"""The base class of all sections."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

EMBEDDED = "embedded"  # the name under which the base model that ships with the program is chosen

PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

"""The fields of `RunConfig` by dotted path: listing, choices, values, and checks of one value."""

from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from trainer.config.settings import RunConfig
from trainer.config.settings.section import Section


def fields() -> Iterator[tuple[str, FieldInfo]]:
    """Yields every setting as (dotted path, field), in the order of declaration.

    The field has a `title` (its label on the page), a `description` (its help) and its bounds.
    """
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            for inner, inner_field in field.annotation.model_fields.items():
                yield f"{name}.{inner}", inner_field
        else:
            yield name, field


def choices(field: FieldInfo) -> tuple[Any, ...]:
    """Returns the allowed values of a field with a fixed set of values, else ()."""
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def several_choices(field: FieldInfo) -> tuple[str, ...]:
    """Returns the allowed words of a field that takes a list of words, else ()."""
    if get_origin(field.annotation) is not tuple:
        return ()
    item = get_args(field.annotation)[0]
    return get_args(item) if get_origin(item) is Literal else ()


def get(config: RunConfig, path: str) -> Any:
    """Returns the value at a dotted path such as "training.learning_rate"."""
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part)
    return value


def value_error(path: str, value: Any) -> str:
    """Returns why a setting cannot have a value, or "" if it can. Ignores all other settings."""
    try:
        _checker(path).validate_python(value)
    except ValidationError as error:
        return plain_message(error.errors()[0]["msg"])
    return ""


def plain_message(message: str) -> str:
    """Removes pydantic's prefix from the message of a check that is written here."""
    return message.removeprefix("Value error, ")


@cache
def _checker(path: str) -> TypeAdapter[Any]:
    annotation = dict(fields())[path].rebuild_annotation()
    return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))

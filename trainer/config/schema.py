"""Looks into the fields."""

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from trainer.config.settings import RunConfig
from trainer.config.settings.section import Section


def fields() -> Iterator[tuple[str, FieldInfo]]:
    """Every knob as (dotted path, field), in the order of declaration: ("training.learning_rate", FieldInfo)."""
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            for inner, inner_field in field.annotation.model_fields.items():
                yield f"{name}.{inner}", inner_field
        else:
            yield name, field


def choices(field: FieldInfo) -> tuple[Any, ...]:
    """The allowed values of a field that has only some, else ()."""
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def several_choices(field: FieldInfo) -> tuple[str, ...]:
    """The allowed words of a field that takes several of them, else ()."""
    inner = get_args(field.annotation)[:1] if get_origin(field.annotation) is tuple else ()
    return get_args(inner[0]) if inner and get_origin(inner[0]) is Literal else ()


def get(config: RunConfig, path: str) -> Any:
    """The value at a dotted path such as "training.learning_rate"."""
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part)
    return value

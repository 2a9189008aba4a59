"""The types of settings, and the frozen dataclasses that hold them."""

import dataclasses
import functools
from typing import Annotated, Any, TypeVar, dataclass_transform

from annotated_types import Ge, Gt, Lt
from pydantic import AfterValidator, BeforeValidator, WrapValidator
from pydantic_core import PydanticCustomError

from distloop.config.references import FromEnvironment

Section = TypeVar("Section")


@dataclass_transform(frozen_default=True)
def section(cls: type[Section]) -> type[Section]:
    """A frozen dataclass in which pydantic refuses unknown keys."""
    cls.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True)(cls)


def _no_truth_value(value: Any) -> Any:
    """`value`, which pydantic would take for 1 or 0 if it is true or false."""
    if isinstance(value, bool):
        raise PydanticCustomError("truth_value", "input should be a valid number, not true or false")
    return value


Int = Annotated[int, BeforeValidator(_no_truth_value)]
Float = Annotated[float, BeforeValidator(_no_truth_value)]
PositiveInt = Annotated[Int, Ge(1)]
NonNegativeInt = Annotated[Int, Ge(0)]
PositiveFloat = Annotated[Float, Gt(0)]
NonNegativeFloat = Annotated[Float, Ge(0)]
Fraction = Annotated[Float, Ge(0), Lt(1)]


def _has_module(text: str) -> str:
    if ":" not in text:
        raise PydanticCustomError("own_name", "module:callable")
    return text


OwnName = Annotated[str, AfterValidator(_has_module)]  # of a function of the user's: module:callable
# Text that may be env:NAME: the setting has the variable's value, and the reference is recorded. What is not Text has
# a plain value, which is recorded, since a resume compares what is trained: numbers, choices, and callables' names.
Text = Annotated[str, WrapValidator(lambda text, check: text if isinstance(text, FromEnvironment) else check(text))]
# Keyword arguments of a data set, model or task, or a loop's own settings.
Arguments = dict[str, Any]
no_arguments = functools.partial(dataclasses.field, default_factory=dict)

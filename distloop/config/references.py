"""A setting env:NAME takes the value of an environment variable. Recorded and shown is env:NAME, never the value."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

from distloop.errors import UsageError

REFERENCE = re.compile(r"env:([A-Za-z_][A-Za-z0-9_]*)")
MEANT = re.compile(r"env:\S+")  # without a space: not the beginning of a sentence


class FromEnvironment(str):
    """The text of an environment variable, for all who use it as text. Its repr() is that of `reference`, so that no
    message with a setting in it shows the value; a pickle of it holds the reference, too."""

    reference: str
    """env:NAME, as the setting has it."""

    def __new__(cls, reference: str) -> FromEnvironment:
        text = super().__new__(cls, os.environ[reference.partition(":")[2]])
        text.reference = reference
        return text

    def __repr__(self) -> str:
        return repr(self.reference)

    def __reduce__(self) -> tuple[Any, ...]:  # of str it holds the value
        return FromEnvironment, (self.reference,)

    def __deepcopy__(self, memo: object) -> FromEnvironment:
        return self


def read_environment(value: Any, key: str = "") -> Any:
    """Nested settings with the variable's text in the place of each env:NAME. `key`: the dotted name of `value`. Raises
    UsageError for a variable that is not set."""
    if isinstance(value, Mapping):
        return {name: read_environment(inner, f"{key}.{name}".lstrip(".")) for name, inner in value.items()}
    if isinstance(value, list):
        return [read_environment(inner, key) for inner in value]
    if not isinstance(value, str) or not (found := REFERENCE.fullmatch(value)):
        if isinstance(value, str) and MEANT.fullmatch(value):
            raise UsageError(f"{key} = {value!r}: env:NAME stands alone, and a NAME has letters, digits and _ only.")
        return value
    if found[1] not in os.environ:
        raise UsageError(f"{key} = {value!r}: there is no environment variable {found[1]}. Set it, and export it.")
    return FromEnvironment(value)


def recorded(value: Any) -> Any:
    """A config, or any part of it, as plain mappings, lists, tuples and values that may be written: with env:NAME for
    what is from the environment."""
    if isinstance(value, FromEnvironment):
        return value.reference
    if dataclasses.is_dataclass(value):
        return {field.name: recorded(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: recorded(inner) for key, inner in value.items()}
    return type(value)(map(recorded, value)) if isinstance(value, (list, tuple)) else value

"""The settings that a loop of one's own declares, with their defaults: start(train, own={"alpha": 0.2})."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import yaml

from distloop.config.references import FromEnvironment, recorded
from distloop.config.secrets import clean_mapping
from distloop.config.settings import Config
from distloop.config.yaml_text import parse_yaml
from distloop.errors import UsageError, suggest


def with_own(config: Config, declared: Mapping[str, Any] | None) -> Config:
    """The config whose `own` has all settings that the loop declares: those given, else their defaults. Raises
    UsageError for a setting that the loop does not declare, and for a value of another type than its default. None
    declares nothing and checks nothing: a command that reads the config of any loop."""
    if declared is None:
        return config
    for key, given in config.own.items():
        if key not in declared:
            names = suggest(key, list(declared)) if declared else " It declares none: start(train, own={…}) does."
            raise UsageError(f"own.{key} = {given!r}: the loop declares no such setting.{names}")
    return dataclasses.replace(config, own={key: _checked(key, config.own, declared[key]) for key in declared})


def _checked(key: str, own: Mapping[str, Any], default: Any) -> Any:
    if not _is_plain(default):
        raise UsageError(
            f"own={{{key!r}: …}}: a default is a finite number, text, True, False, None, or a list or dict of them."
        )
    value = own.get(key, default)
    if isinstance(value, FromEnvironment) and not isinstance(default, str | None):
        value = _number(value)
    if not _is_plain(value):
        raise UsageError(
            f"own.{key} = {value!r}: give finite numbers, text, true, false, or lists or mappings of them."
        )
    if clean_mapping({key: value}) != recorded({key: value}):
        raise UsageError(
            f"own.{key}: its name or value looks like a secret: the run would not record it, nor a resume compare it. "
            "Choose another name, or give it as env:NAME, which is read from the environment and recorded by its name."
        )
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if default is not None and type(recorded(value)) is not type(default):
        kind, is_one = type(recorded(value)).__name__, type(default).__name__
        raise UsageError(
            f"own.{key} = {value!r} is of type {kind}; the loop's default, {default!r}, is of type {is_one}."
        )
    return value


def _number(text: FromEnvironment) -> Any:
    """The number or truth value that the text is, and that is recorded, since a resume compares it; else the text."""
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, int | float) else text


def _is_plain(value: Any) -> bool:
    """True if a config file can hold the value, and it is equal to itself when it is read again."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (int, str)) or (isinstance(value, float) and math.isfinite(value))

"""What --help and docs/config.md say about each setting: its type, default and text, as settings.py has them."""

import ast
import dataclasses
import inspect
import itertools
import types
import typing
from typing import Any, Literal, NamedTuple

from distloop.config import settings
from distloop.config.settings import Config
from distloop.config.yaml_text import dump_yaml

WORDS = {str: "text", int: "integer", float: "number", bool: "true | false", type(None): "null", dict: "mapping"}
BOUNDS = {"ge": "≥", "gt": ">", "lt": "<"}


class Setting(NamedTuple):
    """A setting, all in text."""

    key: str
    """Its dotted name, as in a config file: optim.clip_norm."""
    type: str
    """What it takes: number > 0 | null."""
    default: str
    """Its default as YAML: null."""
    help: str
    """The string below the field in settings.py, in one line."""


def settings_help(config: Config | None = None) -> list[Setting]:
    """All settings in the order of settings.py, those of no section first. `default`: what `config` has, if given."""
    config, texts, rows = config or Config(), _texts_below_fields(), []
    sections = [field.name for field in dataclasses.fields(config) if dataclasses.is_dataclass(field.default)]
    for section in ("", *sections):
        owner: Any = getattr(config, section) if section else config
        hints = typing.get_type_hints(type(owner), include_extras=True)
        for name in filter(lambda name: section or name not in sections, hints):
            default = dump_yaml(getattr(owner, name), in_one_line=True).removesuffix("...\n").strip()
            text = texts[type(owner).__name__, name]
            rows.append(Setting(f"{section}.{name}".lstrip("."), type_text(hints[name]), default, text))
    return rows


def type_text(hint: Any) -> str:
    """A field's type in words: `float | None` -> "number | null"."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        marks = [(sign, getattr(mark, name, None)) for mark in hint.__metadata__ for name, sign in BOUNDS.items()]
        bounds = [f"{sign} {limit}" for sign, limit in marks if limit is not None]
        return f"{type_text(inner[0])} {' and '.join(bounds)}".strip()
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (types.UnionType, typing.Union):
        return " | ".join(map(type_text, inner))
    if origin is tuple:
        return ", ".join("…" if part is ... else type_text(part) for part in inner)
    return WORDS[origin or hint]


def _texts_below_fields() -> dict[tuple[str, str], str]:
    """(class, field) -> the string below the field in settings.py, which Python itself forgets."""
    texts = {}
    for owner in ast.parse(inspect.getsource(settings)).body:
        if isinstance(owner, ast.ClassDef):
            for field, text in itertools.pairwise(owner.body):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    texts[owner.name, ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    return texts

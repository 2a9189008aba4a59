"""What --help and docs/config.md say about each setting: its type, default and text, as settings.py and
optim_settings.py have them."""

import ast
import dataclasses
import inspect
import itertools
import shutil
import textwrap
import types
import typing
from typing import Any, Literal, NamedTuple

from distloop.config import optim_settings, settings
from distloop.config.fields import OwnName
from distloop.config.references import recorded
from distloop.config.settings import SECTIONS, Config, types_of_settings
from distloop.config.yaml_text import dump_yaml

WORDS = {str: "text", int: "integer", float: "number", bool: "true | false", type(None): "null", dict: "mapping"}
BOUNDS = {"ge": "≥", "gt": ">", "lt": "<"}
INDENT = 8 * " "
HEAD = """usage: distloop train [--config FILE] [--SETTING VALUE] …

Settings come from --config FILE and, over it, from the command line. What takes a mapping takes one of its keys, too:
--model.args.width 64; --model.args '{}' takes all away. A value env:NAME is read from that environment variable, and
recorded as env:NAME. Paths take ~ and $NAME."""


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
    values, texts, rows = recorded(config or Config()), _texts_below_fields(), []
    for key, hint in types_of_settings().items():
        section, _, name = key.rpartition(".")
        owner = SECTIONS.get(section, Config)
        value = (values[section] if section else values)[name]
        default = dump_yaml(value, in_one_line=True).removesuffix("...\n").strip()
        rows.append(Setting(key, type_text(hint), default, texts[owner.__name__, name]))
    return rows


def help_text(config: Config) -> str:
    """What --help prints, with the values of `config` as defaults."""
    width = min(shutil.get_terminal_size().columns, 120)
    lines, section = [HEAD], "the run"
    for key, kind, default, text in settings_help(config):
        before, section = section, key.rpartition(".")[0] or "the run"
        if section != before or len(lines) == 1:
            lines.append(f"\n{section}:")
        flag = "--" + key.replace("_", "-")
        off = flag.replace(".", ".no-") if "." in flag else f"--no-{flag[2:]}"
        takes = kind.removeprefix(WORDS[bool]).removeprefix(" | ")
        if kind.startswith(WORDS[bool]):
            lines.append(f"  {flag}, {off}" + (f", {flag} {takes}" if takes else ""))
        else:
            lines.append(f"  {flag} {kind}")
        lines += textwrap.wrap(f"{text} (default: {default})", width, initial_indent=INDENT, subsequent_indent=INDENT)
    return "\n".join(lines)


def type_text(hint: Any) -> str:
    """A field's type in words: `float | None` -> "number | null"."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is OwnName:
        return "module:callable"
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
    return WORDS[dict if dataclasses.is_dataclass(hint) else origin or hint]


def _texts_below_fields() -> dict[tuple[str, str], str]:
    """(class, field) -> the string below the field, which Python itself forgets."""
    texts = {}
    sources = (inspect.getsource(module) for module in (settings, optim_settings))
    for owner in (node for source in sources for node in ast.parse(source).body):
        if isinstance(owner, ast.ClassDef):
            for field, text in itertools.pairwise(owner.body):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    texts[owner.name, ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    return texts

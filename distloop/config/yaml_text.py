"""YAML as people write it: PyYAML's safe loader with YAML 1.2's idea of booleans and numbers.

PyYAML follows YAML 1.1, where `precision: no` is False, `lr: 1e-3` a string, `010` is 8 and `1:30` is 90.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

# tag, pattern, and the characters that such a word may start with
RESOLVERS = (
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN"),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$|^0x[0-9a-fA-F]+$", "-+0123456789"),
    (
        "float",
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf)$|^\.(?:nan|NaN)$",
        "-+.0123456789",
    ),
)


class _Loader(yaml.SafeLoader):
    """Builds plain values only."""


class _Dumper(yaml.SafeDumper):
    """Quotes a string exactly where _Loader would take it for something else."""


for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in RESOLVERS:
        _characters = [*_first, ""] if _tag == "null" else list(_first)
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _characters)


def parse_yaml(text: str) -> Any:
    """The value that `text` stands for: containers, strings, numbers, booleans, None. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def dump_yaml(value: Any, in_one_line: bool = False) -> str:
    """Text that parse_yaml reads back as `value`."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=in_one_line, allow_unicode=True)

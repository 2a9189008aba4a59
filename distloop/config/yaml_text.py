"""Read and write YAML with PyYAML's safe loader and the booleans and numbers of YAML 1.2.

PyYAML follows YAML 1.1, where `precision: no` is False, `lr: 1e-3` a string, `010` is 8 and `1:30` is 90.
"""

import re
from typing import Any

import yaml

NUMBER = r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"
# Tag, pattern, and the characters with which such a word may start.
RESOLVERS = (
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN"),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$|^0x[0-9a-fA-F]+$", "-+0123456789"),
    ("float", rf"{NUMBER}|^[-+]?\.(?:inf|Inf)$|^\.(?:nan|NaN)$", "-+.0123456789"),
)


class _Loader(yaml.SafeLoader):
    """Makes plain values only, no Python objects."""


class _Dumper(yaml.SafeDumper):
    """Quotes a string only if _Loader would read it as something else."""


for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in RESOLVERS:
        _characters = [*_first, ""] if _tag == "null" else list(_first)
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _characters)


def parse_yaml(text: str) -> Any:
    """The value of `text`: mappings, lists, strings, numbers, booleans, None. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def dump_yaml(value: Any, in_one_line: bool = False) -> str:
    """`value` as YAML, which parse_yaml reads back as `value`."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=in_one_line, allow_unicode=True)

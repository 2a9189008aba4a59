"""YAML as people write it: PyYAML's safe loader with YAML 1.2's idea of booleans and numbers.

PyYAML follows YAML 1.1, where `precision: no` is False and `lr: 1e-3` is a string.
"""

from __future__ import annotations

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    pass


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf)$|^\.(?:nan|NaN)$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """The value that `text` stands for: containers, strings, numbers, booleans, None. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader: builds plain values only

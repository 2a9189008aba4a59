"""Read and write YAML with PyYAML's safe loader and the booleans and numbers of YAML 1.2.

PyYAML follows YAML 1.1, where `precision: no` is False, `lr: 1e-3` a string, `010` is 8 and `1:30` is 90. Of a key that
is there twice it takes the last one without a word. Merges (`<<`), which YAML 1.2 does not have, are refused.
"""

import re
from typing import Any

import yaml

NUMBER = r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"
# Tag, pattern, and the characters with which such a word may start.
RESOLVERS = (
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN"),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9]+$|^0x[0-9a-fA-F]+$", "-+0123456789"),
    ("float", rf"{NUMBER}|^[-+]?\.(?:inf|Inf)$|^\.(?:nan|NaN)$", "-+.0123456789"),
)
PLAIN = "tag:yaml.org,2002:"
KINDS = ("null", "bool", "int", "float", "str", "seq", "map")


class WrongKeyError(yaml.YAMLError):
    """A key that is there twice in one mapping, or that merges another one. The message is one line."""


class _Loader(yaml.SafeLoader):
    """Makes plain values only: no Python objects, and no dates, sets and bytes, which a tag would ask for."""


class _Dumper(yaml.SafeDumper):
    """Quotes a string only if _Loader would read it as something else."""


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 16 if text.startswith("0x") else 10)


for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in RESOLVERS:
        _characters = [*_first, ""] if _tag == "null" else list(_first)
        _class.add_implicit_resolver(f"{PLAIN}{_tag}", re.compile(_pattern), _characters)
_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.removeprefix(PLAIN) in KINDS
}
_Loader.add_constructor(f"{PLAIN}int", _integer)


def parse_yaml(text: str | bytes) -> Any:
    """The value of `text`: mappings, lists, strings, numbers, booleans, None. Bytes are in UTF-8, or in UTF-16 with a
    byte order mark. Raises yaml.YAMLError, which in_words() explains."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_keys(loader, node, "", set())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def in_words(error: yaml.YAMLError) -> str:
    """What is wrong, in one line, as the end of a sentence that begins with the name of the file or setting."""
    if isinstance(error, WrongKeyError):
        return f": {error}"
    if isinstance(error, yaml.reader.ReaderError) and error.encoding != "unicode":
        return f": cannot be read: it is no text in UTF-8 (at byte {error.position}). Save it as UTF-8."
    if not isinstance(error, yaml.MarkedYAMLError) or not (mark := error.problem_mark or error.context_mark):
        return f" is not valid YAML: {' '.join(str(error).split())}"
    problem = str(error.problem or error.context)
    if "'\\t'" in problem:
        return f": line {mark.line + 1}: there is a tab, where YAML takes spaces only."
    if isinstance(error, yaml.constructor.ConstructorError) and (tag := re.search(r"for the tag '(.+)'", problem)):
        name = tag[1].replace(PLAIN, "!!")
        return f": line {mark.line + 1}: the tag {name} is not taken: give plain values, lists and mappings."
    return f" is not valid YAML: line {mark.line + 1}, column {mark.column + 1}: {problem}"


def dump_yaml(value: Any, in_one_line: bool = False) -> str:
    """`value` as YAML, which parse_yaml reads back as `value`."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=in_one_line, allow_unicode=True)


def _check_keys(loader: _Loader, node: yaml.Node, place: str, seen: set[int]) -> None:
    """Raise WrongKeyError for a key that is there twice, or a merge. `place`: the dotted name of `node`; `seen`: ids of
    nodes, since an anchor may be anywhere, even inside itself."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(loader, item, place, seen)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[Any, int] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            continue  # refused as a key when it is constructed
        key, line = loader.construct_object(key_node), key_node.start_mark.line + 1
        name = f"{place}.{key}".lstrip(".")
        if key == "<<" and key_node.style is None:  # in quotes it is a key
            raise WrongKeyError(f"line {line}: << (merge) is not taken: write the keys out.")
        if key in lines:
            where = f"line {line}" if line == lines[key] else f"lines {lines[key]} and {line}"
            place_of_both = f"{name} is there twice, in {where}"
            raise WrongKeyError(f"{place_of_both}: all but the last would be dropped. Write it once.")
        lines[key] = line
        _check_keys(loader, value_node, name, seen)

"""Read the words of a command line: --optim.lr 0.1 --model mlp --model.args.width 64 --tracking.tags a b --compile."""

import contextlib
import os
import re
import typing
from collections import deque
from typing import Any, NamedTuple

import yaml

from distloop.config.fields import Text
from distloop.config.settings import SECTIONS, types_of_settings
from distloop.config.yaml_text import in_words, parse_yaml
from distloop.errors import UsageError

HELP = {"-h", "--help"}
NAMED = ("data", "model", "task", "optim", "schedule")  # --model mlp is --model.name mlp
IN_MAPPING = re.compile(r"(?:\w+\.args|own)\.[\w.]+")  # one argument, or one of a loop's own settings


class Given(NamedTuple):
    """A setting on the command line."""

    key: str
    """Its dotted name: optim.lr."""
    value: Any


def read_command_line(words: list[str]) -> list[Given]:
    """The settings in these words, in order. Raises UsageError for words that give none. If there are such settings,
    and may have such values, is checked later, together with those of the file."""
    queue = deque(_checked(word) for word in words if word != "--")
    given = []
    while queue:
        flag, equals, text = (word := queue.popleft()).partition("=")
        if not flag.startswith("--"):
            raise UsageError(f"command line: {word!r}: expected a setting, as in --optim.lr 0.1; --help lists them.")
        key = flag[2:].replace("-", "_")
        key = f"{key}.name" if key in NAMED else key
        switched_on = re.sub(r"(^|\.)no_(\w+)$", r"\1\2", key)
        if switched_on != key and _is_switch(types_of_settings().get(switched_on)) and not equals:
            given.append(Given(switched_on, False))
            continue
        kind = Any if IN_MAPPING.fullmatch(key) else types_of_settings().get(key)
        texts = [text] if equals else []
        takes_many = kind is None or typing.get_origin(kind) is tuple
        while queue and (takes_many or not texts) and (kind is Any or not queue[0].startswith("--")):
            texts.append(queue.popleft())
        if not texts and kind is not None and not _is_switch(kind) and not takes_many:
            raise UsageError(f"command line: {flag} needs a value.")
        if texts == [""] and kind is not None and not _is_mapping(kind) and not key.startswith("tracking."):
            none = "null stands for none" + (", and \"''\" for the empty text" if kind is Any else "")
            raise UsageError(f"command line: {flag} has an empty value; {none}. Was a variable of the shell not set?")
        value = _value(key, kind, texts)
        if key in SECTIONS and isinstance(value, dict):  # it would replace the whole section of the file
            raise UsageError(f"command line: {flag} is a section: give its settings one by one, as {flag}.NAME VALUE.")
        given.append(Given(key, value))
    return given


def _checked(word: str) -> str:
    """The word, in UTF-8 whatever the locale is. Raises UsageError for the end of a line as Windows writes it."""
    if word.endswith("\r"):
        raise UsageError(
            f"command line: {word!r} ends in a carriage return: the script or list that it is from has the line ends "
            "of Windows. dos2unix FILE changes them."
        )
    try:
        return os.fsencode(word).decode()
    except UnicodeDecodeError:
        return word


def _is_switch(kind: Any) -> bool:
    """True if settings of this type take true and false, so that a flag without a value is true."""
    return kind is bool or bool in typing.get_args(kind)


def _is_mapping(kind: Any) -> bool:
    """True if settings of this type take a mapping."""
    return typing.get_origin(kind) is dict


def _value(key: str, kind: Any, texts: list[str]) -> Any:
    """The value that these words give a setting of type `kind`; None: there is no such setting."""
    if typing.get_origin(kind) is tuple:
        return _texts(texts) if Text in typing.get_args(kind) else _numbers(key, texts)
    if kind is None and len(texts) > 1:
        return texts
    if not texts:
        return True
    takes_yaml = kind is Any or _is_mapping(kind)
    if texts == ["None"] and not takes_yaml:
        return None
    if not takes_yaml and {str, Text} & {kind, *typing.get_args(kind)} and texts != ["null"]:
        return texts[0]  # as it is: --name 5
    return _from_yaml(key, texts[0], takes_yaml)


def _numbers(key: str, texts: list[str]) -> list[Any]:
    """The values of `0.9 0.95`, `[0.9, 0.95]` as YAML and JSON have lists, or `(0.9, 0.95)` as Python has tuples."""
    whole = " ".join(texts).strip()
    if whole[:1] + whole[-1:] in ("[]", "()"):
        found = _from_yaml(key, f"[{whole[1:-1]}]")
        if isinstance(found, list):
            return found
    return [_from_yaml(key, text) for text in texts]


def _texts(words: list[str]) -> list[str]:
    """The values of `a b`, as they are, or of `[a, b]` as YAML and JSON have lists."""
    whole = " ".join(words).strip()
    if whole[:1] + whole[-1:] == "[]":
        with contextlib.suppress(yaml.YAMLError):
            found = yaml.load(whole, yaml.BaseLoader)  # which makes texts of all words
            if isinstance(found, list) and all(isinstance(one, str) for one in found):
                return found
    return words


def _from_yaml(key: str, text: str, is_checked: bool = False) -> Any:
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        if is_checked:
            words = in_words(error)
            raise UsageError(f"command line: {key} = {text!r}{'' if words[0] == ':' else ': it'}{words}") from None
        return text  # a later check says what is meant

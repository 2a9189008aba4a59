"""Mask secrets: a key, a token or a password becomes *** before it is written or printed.

A value is a secret if it has a secret's name (`token: …`, MY_API_KEY=…: named_secrets.py) or shape (hf_…, a JWT,
user:password@host). The values of environment variables and settings with such names are masked in all texts. In doubt
a value is masked: a false mask costs little, a leak much.
"""

import itertools
import json
import os
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any

from distloop.config.named_secrets import MASK, SHORTEST, WORD, clean_named, secrecy
from distloop.config.references import REFERENCE, FromEnvironment, recorded

# Under a name with one of these words 40 hexadecimal digits are no key.
COMMITS = {"commit", "revision", "rev", "sha", "sha1", "hash", "digest", "checksum"}
NOT_SECRET_VARIABLES = {"PWD", "OLDPWD"}  # the shell's folders

# Keys with a prefix that their service gives them. Where ordinary words begin so too, a digit must follow.
# All quantifiers are possessive or bounded, so that any text takes linear time.
SHAPES = re.compile(
    r"""
    -----BEGIN\ [A-Z0-9 ]{0,40}PRIVATE\ KEY(?:\ BLOCK)?-----
        (?s:(?!-----END\ ).){0,16000}+ (?:-----END\ [A-Z0-9 ]{0,40}-----)?
    | (?<![A-Za-z0-9]) (?:
        (?:hf_|gh[opsur]_|gsk_|npm_|dckr_pat_) (?=[A-Za-z]{0,60}[0-9]) [A-Za-z0-9]{10,}+
        | (?:sk-|[sr]k_(?:live|test)_|nvapi-|pypi-) (?=[A-Za-z_-]{0,60}[0-9]) [\w-]{10,}+
        | (?:github_pat_|glpat-|xox[abeoprs]-|wandb_v1_|ya29\.) [\w.-]{8,}+
        | (?:AKIA|ASIA)[A-Z0-9]{12,}+
        | AIza[\w-]{30,}+
    )
    | (?<![\w-]) eyJ[\w-]{4,}+\.[\w-]{4,}+\.[\w-]*+
    """,
    re.VERBOSE,
)
HEX_KEY = re.compile(r"(?<![0-9A-Za-z])[0-9a-fA-F]{40}(?![0-9A-Za-z])")  # a key of W&B, or a commit of git
IN_URL = re.compile(r"(?<=://)(?:[^\s/@:]{0,256}:[^\s/]{1,1024}|[^\s/@:]{16,256})@")
SIGNATURE = re.compile(r"(?<=[?&])((?i:sig|signature|x-amz-signature)=)[^&\s\"']++")
BEARER = re.compile(r"\b((?i:bearer)[ \t]{1,9})[\w.~+/=-]{8,}+")
CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # auth:make_data is a callable, not a value named auth

# The secrets among the settings of this process. Global, since any exception's message may contain one.
_remembered: set[str] = set()
# What user code got from env:NAME under names that are not those of secrets. It may be a secret or an ordinary word, so
# that it is masked in messages alone: in a config or in source code a masked word would change what that says.
_from_environment: set[str] = set()


def remember_secrets(settings: Any) -> None:
    """Mask the secrets of these settings in all texts from now on, and in messages what user code gets from the
    environment. Not those of fewer than 8 characters, nor ordinary words (`key: filename`), which other texts contain,
    too."""
    for key, value in _leaves(settings):
        if isinstance(value, FromEnvironment):
            if secrecy(key) or secrecy(value.reference):
                _remembered.update([str(value), *value.splitlines()])
            elif ".args." in key or key.startswith("own."):
                _from_environment.update([str(value), *value.splitlines()])
        elif value is None or clean_mapping(value, key, {}) != MASK:
            continue
        elif secrecy(key) == "strong" or not re.fullmatch("[a-z_]+", str(value)):
            _remembered.add(str(value))


def clean_text(text: str, environ: Mapping[str, str] = os.environ, commits: bool = False) -> str:
    """`text` with *** for each secret. `commits`: 40 hexadecimal digits are a commit of git, not a key of W&B."""
    return clean_named(_clean_unnamed(text, environ, commits))


def clean_message(text: str) -> str:
    """A message or traceback, which may quote any setting, with *** for each secret and for what user code got from the
    environment."""
    return clean_named(_clean_unnamed(text, os.environ, messages=True))


def clean_mapping(value: Any, name: str = "", environ: Mapping[str, str] = os.environ) -> Any:
    """Nested mappings, lists and plain values with *** for each secret. `name`: the dotted key of `value`."""
    if isinstance(value, Mapping):
        before = f"{name}." if name else ""
        inner = {key: clean_mapping(setting, f"{before}{key}", environ) for key, setting in value.items()}
        return {_clean_unnamed(key, environ) if isinstance(key, str) else key: one for key, one in inner.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(clean_mapping(inner, name, environ) for inner in value)
    if isinstance(value, str) and REFERENCE.fullmatch(reference := recorded(value)):
        return reference
    strength = secrecy(name)
    if isinstance(value, (str, bytes)) and value and strength:
        return MASK
    if isinstance(value, str):
        commits = not COMMITS.isdisjoint(word.lower() for word in WORD.findall(name))
        clean = _clean_unnamed if CALLABLE.fullmatch(value) else clean_text
        return clean(value, environ, commits)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and strength:
        return MASK if strength == "strong" or len(str(value)) >= SHORTEST else value
    return value


def clean_command(words: list[str], environ: Mapping[str, str] = os.environ) -> list[str]:
    """A command line with *** for each secret, also inside YAML: --data.args '{token: …}'."""
    cleaned = []
    for before, word in itertools.pairwise(["", *words]):
        flag = before if before.startswith("-") and "=" not in before else ""  # whose value the word may be
        name, equals, value = word.partition("=")
        if word.startswith("-") and equals and not secrecy(flag):
            cleaned.append(f"{name}={_clean_value(value, name, environ)}")
        else:
            cleaned.append(_clean_value(word, flag, environ))
    return cleaned


def unmask(old: Any, new: Any) -> Any:
    """`old` with the values of `new` in the place of masked secrets."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return {key: unmask(value, new[key]) if key in new else value for key, value in old.items()}
    if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) and len(old) == len(new):
        return [unmask(before, after) for before, after in zip(old, new, strict=True)]
    if isinstance(old, str) and (old == MASK or (MASK in old and isinstance(new, str) and _fits(old, new))):
        return new
    return old


def masked_keys(settings: Any) -> list[str]:
    """The dotted keys of the settings that hold a masked secret."""
    return list(dict.fromkeys(key for key, value in _leaves(settings) if isinstance(value, str) and MASK in value))


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, plain value) of all that is in nested mappings and lists."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _leaves(inner, key)
    else:
        yield key, value


def _fits(masked: str, text: str) -> bool:
    """True if `masked` is `text` with *** for parts of it."""
    first, *middle, last = map(re.escape, masked.split(MASK))
    return re.fullmatch(f"{first}{''.join(f'(?>.*?{part})' for part in middle)}.*{last}", text, re.DOTALL) is not None


def _clean_value(word: str, flag: str, environ: Mapping[str, str]) -> str:
    """A word of a command line, which may be the value of `flag`, with *** for each secret."""
    from distloop.config.yaml_text import dump_yaml, parse_yaml

    try:
        value = parse_yaml(word)
    except Exception:  # it is no YAML, but a string
        value = word
    cleaned = clean_mapping(value, flag, environ)
    if not isinstance(value, (Mapping, list)):
        return word if cleaned == value else str(cleaned)
    return clean_text(word, environ) if cleaned == value else dump_yaml(cleaned, in_one_line=True).strip()


def _clean_unnamed(text: str, environ: Mapping[str, str], commits: bool = False, messages: bool = False) -> str:
    """`text` with *** for the secrets of this process and all that has the shape of one."""
    values = _remembered | _from_environment if messages else set(_remembered)
    for name, value in environ.items():
        if secrecy(name) and name not in NOT_SECRET_VARIABLES:
            values |= {value, *value.splitlines()}
    values = {value.strip() for value in values if len(value.strip()) >= SHORTEST and value.strip(" *")}
    forms = set(values)  # a value itself, and its forms in a URL, in a repr, also that of its bytes, and in JSON
    for value in values:
        forms |= {urllib.parse.quote(value, safe=""), repr(value)[1:-1], json.dumps(value)[1:-1]}
        forms.add(repr(value.encode(errors="surrogateescape"))[2:-1])
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, MASK)
    text = IN_URL.sub(f"{MASK}@", SHAPES.sub(MASK, text))
    for pattern in (SIGNATURE, BEARER):
        text = pattern.sub(rf"\g<1>{MASK}", text)
    return text if commits else HEX_KEY.sub(MASK, text)

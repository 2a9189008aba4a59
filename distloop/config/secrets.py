"""Secrets: what looks like a key, a token or a password becomes *** before it is written or shown.

A value is taken for a secret by its name (`token: …`, MY_API_KEY=…: named_secrets.py), by its shape (hf_…, a JWT,
user:password@host), or because it is one that this process was given, in an environment variable or a setting with
such a name: that is masked wherever it appears. A false mask costs little, a leak much.
"""

from __future__ import annotations

import json
import os
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any

from distloop.config.named_secrets import MASK, SHORTEST, WORD, clean_named, secrecy

COMMITS = {"commit", "revision", "rev", "sha", "sha1", "hash", "digest", "checksum"}  # in a name: 40 digits are no key
NO_VARIABLES = {"PWD", "OLDPWD"}  # the shell's folders

# What its owner has given a beginning by which it is known; where ordinary words begin so too, a digit has to follow.
# All quantifiers are possessive or bounded: no text takes more than linear time.
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
HEX_KEY = re.compile(r"(?<![0-9A-Za-z])[0-9a-fA-F]{40}(?![0-9A-Za-z])")  # W&B's, and git's commits
IN_URL = re.compile(r"(?<=://)(?:[^\s/@:]{0,256}:[^\s/]{1,1024}|[^\s/@:]{16,256})@")
SIGNATURE = re.compile(r"(?<=[?&])((?i:sig|signature|x-amz-signature)=)[^&\s\"']++")
BEARER = re.compile(r"\b((?i:bearer)[ \t]{1,9})[\w.~+/=-]{8,}+")
CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # auth:make_data is no `auth: make_data`

# Values that the settings of this process name as secrets: the only state, since an exception may carry one anywhere.
_learned: set[str] = set()


def learn(settings: Any, name: str = "") -> None:
    """From now on the secrets of these settings are masked wherever they appear, as the environment's are.

    Those of 8 characters and more; not ordinary words (`key: filename`), which would be missed in what is shown.
    """
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            learn(value, f"{name}.{key}")
    elif isinstance(settings, (list, tuple)):
        for value in settings:
            learn(value, name)
    elif settings is not None and clean_mapping(settings, name, {}) == MASK:
        value = str(settings)
        if secrecy(name) == "strong" or not re.fullmatch("[a-z_]+", value):
            _learned.add(value)


def clean_text(text: str, environ: Mapping[str, str] = os.environ, commits: bool = False) -> str:
    """`text` with *** for each secret. `commits`: words of 40 hexadecimal digits are git's, not keys of W&B."""
    return clean_named(_clean_known(text, environ, commits))


def clean_mapping(value: Any, name: str = "", environ: Mapping[str, str] = os.environ) -> Any:
    """Settings, or whatever is made of mappings, lists and plain values, with *** for each secret.

    `name`: the dotted key under which `value` stands.
    """
    if isinstance(value, Mapping):
        inner = {key: clean_mapping(one, f"{name}.{key}" if name else str(key), environ) for key, one in value.items()}
        return {_clean_known(key, environ) if isinstance(key, str) else key: one for key, one in inner.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(clean_mapping(one, name, environ) for one in value)
    kind = secrecy(name)
    if isinstance(value, (str, bytes)) and value and kind:
        return MASK
    if isinstance(value, str):
        commits = not COMMITS.isdisjoint(word.lower() for word in WORD.findall(name))
        clean = _clean_known if CALLABLE.fullmatch(value) else clean_text
        return clean(value, environ, commits)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and kind:
        return MASK if kind == "strong" or len(str(value)) >= SHORTEST else value
    return value


def clean_command(words: list[str], environ: Mapping[str, str] = os.environ) -> list[str]:
    """A command line with *** for each secret, also inside of YAML: --data.args '{token: …}'."""
    shown = []
    flag = ""  # whose value may come
    for word in words:
        name, equals, value = word.partition("=")
        if not word.startswith("-") or secrecy(flag):
            shown.append(_clean_word(word, flag, environ))
        elif equals:
            shown.append(f"{name}={_clean_word(value, name, environ)}")
        else:
            shown.append(_clean_known(word, environ))
        flag = word if word.startswith("-") and not equals else ""
    return shown


def unmask(old: Any, new: Any) -> Any:
    """`old` with the values of `new` in the places where secrets were masked."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return {key: unmask(value, new[key]) if key in new else value for key, value in old.items()}
    if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) and len(old) == len(new):
        return [unmask(one, other) for one, other in zip(old, new, strict=True)]
    if isinstance(old, str) and (old == MASK or (MASK in old and isinstance(new, str) and _fits(old, new))):
        return new
    return old


def masked_keys(value: Any, name: str = "") -> Iterator[str]:
    """The dotted keys of the settings in which a masked secret stands."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from masked_keys(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from masked_keys(inner, name)
    elif isinstance(value, str) and MASK in value:
        yield name


def _fits(masked: str, text: str) -> bool:
    """Whether `masked` is `text` with some of it replaced by ***."""
    first, *middle, last = masked.split(MASK)
    position, end = len(first), len(text) - len(last)
    if not (text.startswith(first) and text.endswith(last) and position <= end):
        return False
    for part in middle:
        found = text.find(part, position, end)
        if found < 0:
            return False
        position = found + len(part)
    return True


def _clean_word(word: str, flag: str, environ: Mapping[str, str]) -> str:
    """A word of a command line that may be the value of `flag`."""
    from distloop.config.yaml_text import dump_yaml, parse_yaml

    try:
        value = parse_yaml(word)
    except Exception:  # whatever was typed, it is recorded
        value = word
    cleaned = clean_mapping(value, flag, environ)
    if isinstance(value, (Mapping, list)):
        return clean_text(word, environ) if cleaned == value else dump_yaml(cleaned, in_one_line=True).strip()
    return word if cleaned == value else str(cleaned)


def _clean_known(text: str, environ: Mapping[str, str], commits: bool = False) -> str:
    """`text` without the secrets that this process was given, and without what has a secret's shape."""
    values = set(_learned)
    for name, value in environ.items():
        if secrecy(name) and name not in NO_VARIABLES:
            values |= {value, *value.splitlines()}
    values = {value.strip() for value in values if len(value.strip()) >= SHORTEST and value.strip(" *")}
    # As they are, and as they look in an URL, in a repr and in JSON.
    forms = {
        form
        for value in values
        for form in (value, urllib.parse.quote(value, safe=""), repr(value)[1:-1], json.dumps(value)[1:-1])
    }
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, MASK)
    text = SHAPES.sub(MASK, text)
    text = IN_URL.sub(f"{MASK}@", text)
    text = SIGNATURE.sub(rf"\g<1>{MASK}", text)
    text = BEARER.sub(rf"\g<1>{MASK}", text)
    return text if commits else HEX_KEY.sub(MASK, text)

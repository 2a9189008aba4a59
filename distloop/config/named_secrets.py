"""Names of secrets, and the values that stand beside such a name in a text: name=value, "name": "value", --name value.

Left alone are true, false, null and, under key, token and the like (but not under password or secret), numbers of fewer
than 8 characters. What is in doubt is masked: `key: image` too.
"""

from __future__ import annotations

import functools
import re
from typing import Literal

MASK = "***"
SHORTEST = 8  # characters: of numbers that are masked under weak names, of values that are masked wherever they appear

# Words of a name. Under STRONG ones any number is a secret too.
STRONG = {"password", "passwords", "passwd", "pwd", "passphrase", "secret", "secrets"}
WEAK = {"key", "apikey", "token", "auth", "oauth", "authorization", "credential", "credentials", "private", "pass"}
WEAK |= {"jwt", "cookie", "sshpass"}
# Names without separators, such as PGPASSWORD. "key" is not among them: monkey.
STRONG_ENDINGS, WEAK_ENDINGS = ("password", "passwd", "passphrase", "secret"), ("token", "apikey", "credentials")
# Names of something else: pad_token, label_key; key_file, token_type, KeyError.
NO_SECRET_BEFORE = {"pad", "eos", "bos", "unk", "cls", "sep", "mask", "special", "public", "sort", "primary", "foreign"}
NO_SECRET_BEFORE |= {"image", "label", "target", "input", "output", "text", "column", "feature"}
NO_SECRET_LAST = {"file", "path", "dir", "directory", "folder", "sock", "home", "name", "type", "size", "length", "dim"}
NO_SECRET_LAST |= {"error", "exception", "warning"}
SEVERAL = {"api", "access", "refresh", "bearer"}  # before keys and tokens, which alone are no secrets: num_keys

WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")

# All quantifiers below are possessive or bounded: no text takes more than linear time.
NAMED = re.compile(
    r"""(?<![\w.-]) (?P<flag>--)?+ [-.]*+ (?P<name>\w[\w.-]*+) (?:
        (?:\\*+["'`])?+ \]?+ [ \t]*+ (?P<sign>:=|=>|!=|==?|:) [ \t]*+
        | (?(flag) (?:\\*+["'],?)?+[ \t]++(?!--) | (?!))
    )""",
    re.VERBOSE,
)
BEGINNING = re.compile(r"[-+ \t>#*]*+(?:(?:export|ENV)[ \t]++)?+[\"'\\]*+")  # of a line, before a name
ANNOTATION = re.compile(r"(?:str|bytes|int|float|bool|Any|Optional)(?![\w.-])[\w.\[\]| ]{0,60}?=(?!=)[ \t]*+")
QUOTE = re.compile(r"[A-Za-z]{0,2}(?P<quote>\\*+(?:\"\"\"|'''|[\"'`]))")
TO_QUOTE = {quote: re.compile(rf"(?:[^{quote}\\]|\\.)*+{quote}") for quote in "\"'`"}
ANOTHER = re.compile(r"[ \t]*+\+?[ \t]*+(?=[A-Za-z]{0,2}[\"'])")  # string, which Python adds to the one before
CLOSING = re.compile(r"[\s,;)}\]\"'\\]*+")
BARE = re.compile(
    r"(?:(?i:bearer|basic|digest|token)[ \t]++)?+"  # of an Authorization header
    r"(?:[,;)}\]\"'`]*+[^\s,;)}\]\"'`]++)++"  # without what closes around it
)
NO_VALUE = re.compile(
    r"lambda(?![\w.-])|(?:str|int|float|bool|bytes|Any|[Nn]one|null|[Tt]rue|[Ff]alse)(?=\s*+(?:[,;)}\]|:#\"']|$))"
)
NUMBER = re.compile(r"[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?")
CODE = re.compile(r"self\.|[A-Za-z_][\w.]*[(\[]")
OPENING = re.compile(r"(?:[|>][-+0-9]*|[(\[{\\])?\s*(?:#.*)?")  # the value is on the lines that follow
INDENT = re.compile(r"[-+ \t]*+")  # or that of a diff


@functools.lru_cache(4096)
def secrecy(name: str) -> Literal["strong", "weak"] | None:
    """Whether a value of this name is a secret, by whole words of the name: MY_API_KEY, data.args.authToken.

    weak: as far as it is not a short number.
    """
    words = [word.lower() for word in WORD.findall(name)]
    if not words or words[-1] in NO_SECRET_LAST:
        return None
    if any(word in STRONG or word.endswith(STRONG_ENDINGS) for word in words):
        return "strong"
    for before, word in zip(["", *words], words, strict=False):
        if word in ("key", "token") and before in NO_SECRET_BEFORE:
            continue
        if word in WEAK or word.endswith(WEAK_ENDINGS) or (word in ("keys", "tokens") and before in SEVERAL):
            return "weak"
    return None


def clean_named(text: str) -> str:
    """`text` with *** for the values whose names say that they are secrets."""
    shown = []
    goes_on: int | str | None = None  # a value of several lines: those indented deeper than this, or up to a quote
    for line in text.split("\n"):
        indent = INDENT.match(line).end()  # type: ignore[union-attr]  # it matches anything
        if isinstance(goes_on, str):
            _, quote, line = line.partition(goes_on)
            shown.append(f"{MASK}{quote}{line and MASK}")
            goes_on = None if quote else goes_on
        elif goes_on is not None and (indent > goes_on or indent >= len(line.rstrip())):
            shown.append(line[:indent] + MASK if line[indent:].strip() else line)
        else:
            cleaned, goes_on = _clean_line(line, indent) if line else (line, None)
            shown.append(cleaned)
    return "\n".join(shown)


def _clean_line(line: str, indent: int) -> tuple[str, int | str | None]:
    """The line without named secrets, and whether the last one goes on in the lines after it, as in clean_named."""
    parts: list[str] = []
    done = 0
    goes_on: int | str | None = None
    beginning = BEGINNING.match(line).end()  # type: ignore[union-attr]  # it matches anything
    for match in NAMED.finditer(line):
        kind = secrecy(match["name"][-100:])
        if kind is None or match.start() < done:
            continue
        start = match.end()
        # First on its line, as in YAML and .env files, which take the rest of it.
        leads = match.start("name") <= beginning and not match["flag"]
        if leads and OPENING.fullmatch(line, start):
            goes_on = indent
            break
        annotation = ANNOTATION.match(line, start) if match["sign"] == ":" else None
        start = annotation.end() if annotation else start
        opening = QUOTE.match(line, start)
        if opening:
            value, end = _quoted(line, opening)
            if end < 0:
                goes_on = opening["quote"] if len(opening["quote"]) == 3 else None
            if end < 0 or (leads and not CLOSING.fullmatch(line, end)):
                value, end = MASK, len(line)
        else:
            bare = BARE.match(line, start)
            if bare is None or _is_no_secret(line, start, bare[0], kind, match["sign"]):
                continue
            value, end = MASK, len(line.rstrip()) if leads else bare.end()
        parts += [line[done:start], value]
        done = end
    return "".join([*parts, line[done:]]), goes_on


def _quoted(line: str, opening: re.Match[str]) -> tuple[str, int]:
    """What is shown of the strings that begin here, and where the last one ends; -1: not on this line."""
    first = opening
    empty = True
    while True:
        quote = opening["quote"]
        if quote in TO_QUOTE:
            closing = TO_QUOTE[quote].match(line, opening.end())
            end = closing.end() if closing else -1
        else:
            found = line.find(quote, opening.end())
            end = found + len(quote) if found >= 0 else -1
        if end < 0:
            return "", -1
        empty = empty and end == opening.end() + len(quote)
        another = ANOTHER.match(line, end)
        following = QUOTE.match(line, another.end()) if another and quote in TO_QUOTE else None
        if following is None:
            return (first[0] + quote if empty else f"{first[0]}{MASK}{quote}"), end
        opening = following


def _is_no_secret(line: str, start: int, value: str, kind: str, sign: str | None) -> bool:
    """Whether what stands without quotes beside the name of a secret is none."""
    if NO_VALUE.match(line, start):
        return True
    if kind == "strong":
        return False
    if NUMBER.fullmatch(value):
        return len(value) < SHORTEST
    # key = self.projection(x): what is computed is no secret, unless from one that is written there.
    is_code = sign not in (None, ":") and len(line) < 2000 and CODE.match(line, start)
    return bool(is_code) and not any(quote in line[start:] for quote in "\"'")

"""Find names of secrets in a text and mask the values beside them: name=value, "name": "value", --name value.

Values that are never masked: true, false, null; numbers of fewer than 8 characters under weak names (key, token), but
not under strong ones (password, secret). In doubt a value is masked: `key: image` too.
"""

import functools
import re
from typing import Literal

MASK = "***"
SHORTEST = 8  # characters of a number that is masked under a weak name, and of a value that is masked everywhere

# Words in names of secrets. Under a STRONG one a short number is a secret, too.
STRONG = {"password", "passwords", "passwd", "pwd", "passphrase", "secret", "secrets"}
WEAK = {"key", "apikey", "token", "auth", "oauth", "authorization", "credential", "credentials", "private", "pass"}
WEAK |= {"jwt", "cookie", "sshpass"}
# Ends of names without separators, such as PGPASSWORD. "key" is not among them, because of monkey.
STRONG_ENDINGS, WEAK_ENDINGS = ("password", "passwd", "passphrase", "secret"), ("token", "apikey", "credentials")
# A name is no secret's with one of these before "key" or "token" (pad_token, label_key), or at its end (key_file,
# token_type, KeyError).
NOT_SECRET_AFTER = {"pad", "eos", "bos", "unk", "cls", "sep", "mask", "special", "public", "sort", "primary", "foreign"}
NOT_SECRET_AFTER |= {"image", "label", "target", "input", "output", "text", "column", "feature"}
NOT_SECRET_LAST = {"file", "path", "dir", "directory", "folder", "sock", "home", "name", "type", "size", "length"}
NOT_SECRET_LAST |= {"dim", "error", "exception", "warning"}
PLURAL_AFTER = {"api", "access", "refresh", "bearer"}  # api_keys is a name of secrets, num_keys is not

WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")

# All quantifiers below are possessive or bounded, so that any text takes linear time.
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
STRING = r"""[A-Za-z]{0,2}(?!\"{3}|'{3}|`{3})(?:"(?:[^"\\]|\\.)*+"|'(?:[^'\\]|\\.)*+'|`(?:[^`\\]|\\.)*+`)"""
NEXT_STRING = re.compile(r"[ \t]*+\+?[ \t]*+[A-Za-z]{0,2}[\"']")
STRINGS = re.compile(rf"{STRING}(?:[ \t]*+\+?[ \t]*+{STRING})*+")  # Python joins them
CLOSING = re.compile(r"[\s,;)}\]\"'\\]*+")
BARE = re.compile(
    r"(?:(?i:bearer|basic|digest|token)[ \t]++)?+"  # of an Authorization header
    r"(?:[,;)}\]\"'`]*+[^\s,;)}\]\"'`]++)++"  # not the brackets and quotes that close around it
)
NO_VALUE = re.compile(
    r"lambda(?![\w.-])|(?:str|int|float|bool|bytes|Any|[Nn]one|null|[Tt]rue|[Ff]alse)(?=\s*+(?:[,;)}\]|:#\"']|$))"
)
# env:NAME, and after it the end of the line, what closes around it, a comment, or another flag.
REFERENCE = re.compile(
    r"(?P<quote>\\*+[\"'`]|)env:[A-Za-z_][A-Za-z0-9_]*+(?P=quote)[ \t]*+(?=[,;)}\]#\\]|[\"'`](?!\w)|--|$)"
)
NUMBER = re.compile(r"[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?")
CODE = re.compile(r"self\.|[A-Za-z_][\w.]*[(\[]")
OPENING = re.compile(r"(?:[|>][-+0-9]*|[(\[{\\])?\s*(?:#.*)?")  # its value is on the next lines
INDENT = re.compile(r"[-+ \t]*+")  # also with the + or - of a diff


@functools.lru_cache(4096)
def secrecy(name: str) -> Literal["strong", "weak"] | None:
    """How surely this name is a secret's, by its words: MY_API_KEY, data.args.authToken. None: it is not. "weak": short
    numbers under this name are no secrets."""
    words = [word.lower() for word in WORD.findall(name)]
    if not words or words[-1] in NOT_SECRET_LAST:
        return None
    if any(word in STRONG or word.endswith(STRONG_ENDINGS) for word in words):
        return "strong"
    for before, word in zip(["", *words], words, strict=False):
        if word in ("key", "token") and before in NOT_SECRET_AFTER:
            continue
        if word in WEAK or word.endswith(WEAK_ENDINGS) or (word in ("keys", "tokens") and before in PLURAL_AFTER):
            return "weak"
    return None


def clean_named(text: str) -> str:
    """`text` with *** for the values beside names of secrets."""
    cleaned_lines = []
    # A value may go on in the next lines: in those with a deeper indent than this number, or up to this quote.
    open_value: int | str | None = None
    for line in text.split("\n"):
        indent = INDENT.match(line).end()  # type: ignore[union-attr]  # it matches anything
        if isinstance(open_value, str):
            _, quote, line = line.partition(open_value)
            cleaned_lines.append(f"{MASK}{quote}{line and MASK}")
            open_value = None if quote else open_value
        elif open_value is not None and (indent > open_value or indent >= len(line.rstrip())):
            cleaned_lines.append(line[:indent] + MASK if line[indent:].strip() else line)
        else:
            cleaned, open_value = _clean_line(line, indent) if line else (line, None)
            cleaned_lines.append(cleaned)
    return "\n".join(cleaned_lines)


def _clean_line(line: str, indent: int) -> tuple[str, int | str | None]:
    """The line with *** for named secrets, and the `open_value` of clean_named after it."""
    parts: list[str] = []
    done = 0
    open_value: int | str | None = None
    beginning = BEGINNING.match(line).end()  # type: ignore[union-attr]  # it matches anything
    for match in NAMED.finditer(line):
        strength = secrecy(match["name"][-100:])
        if strength is None or match.start() < done:
            continue
        start = match.end()
        # A name at the beginning of a line, as in YAML and .env files: its value is the rest of the line.
        leads = match.start("name") <= beginning and not match["flag"]
        if leads and OPENING.fullmatch(line, start):
            open_value = indent
            break
        annotation = ANNOTATION.match(line, start) if match["sign"] == ":" else None
        start = annotation.end() if annotation else start
        if REFERENCE.match(line, start):
            continue
        opening = QUOTE.match(line, start)
        if opening:
            value, end = _mask_strings(line, opening)
            if end < 0:
                open_value = opening["quote"] if len(opening["quote"]) == 3 else None
            if end < 0 or (leads and not CLOSING.fullmatch(line, end)):
                value, end = MASK, len(line)
        else:
            bare = BARE.match(line, start)
            if bare is None or _is_not_secret(line, start, bare[0], strength, match["sign"]):
                continue
            value, end = MASK, len(line.rstrip()) if leads else bare.end()
        parts += [line[done:start], value]
        done = end
    return "".join([*parts, line[done:]]), open_value


def _mask_strings(line: str, opening: re.Match[str]) -> tuple[str, int]:
    """The masked text of the strings that begin with `opening`, and where the last one ends; -1: not on this line."""
    quote, start = opening["quote"], opening.end()
    if len(quote) > 1:  # with backslashes before it, or tripled
        end = line.find(quote, start) + len(quote)
        return (f"{opening[0]}{MASK if end > start + len(quote) else ''}{quote}", end) if end >= start else ("", -1)
    strings = STRINGS.match(line, opening.start())
    if strings is None or NEXT_STRING.match(line, strings.end()):
        return "", -1
    return f"{opening[0]}{MASK if strings.end() > start + 1 else ''}{strings[0][-1]}", strings.end()


def _is_not_secret(line: str, start: int, value: str, strength: str, sign: str | None) -> bool:
    """True if `value`, without quotes beside the name of a secret, is none."""
    if NO_VALUE.match(line, start):
        return True
    if strength == "strong":
        return False
    if NUMBER.fullmatch(value):
        return len(value) < SHORTEST
    # key = self.projection(x): a computed value is no secret, unless a string in the code is one.
    is_code = sign not in (None, ":") and len(line) < 2000 and CODE.match(line, start)
    return bool(is_code) and not any(quote in line[start:] for quote in "\"'")

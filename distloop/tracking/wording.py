"""Numbers, times and sizes as people read them."""

from __future__ import annotations

from typing import Any

ASCII = {"·": "-", "×": "x", "…": "...", "–": "-", "—": "-", "→": "->", "━": "=", "─": "-", "≤": "<=", "≥": ">="}


def number(value: Any) -> str:
    """A number as people read it: 0.9806, 1.2e-05, 12345; anything else (a list of a user's task) as it is."""
    if not isinstance(value, (int, float)):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """65 -> 1:05, 3700 -> 1:01:40."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def sayable(text: str, encoding: str | None) -> str:
    """The text with what `encoding` cannot say replaced: · by -, … by ..., a letter by a question mark."""
    try:
        text.encode(encoding or "utf-8")
        return text
    except UnicodeEncodeError:
        return "".join(_sayable(character, encoding or "utf-8") for character in text)


def _sayable(character: str, encoding: str) -> str:
    try:
        character.encode(encoding)
        return character
    except UnicodeEncodeError:
        return ASCII.get(character, "?")

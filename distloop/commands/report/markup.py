"""Small pieces of HTML. Whatever comes from a run goes through `text`, which escapes it."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from distloop.tracking.wording import UNKNOWN, number_with_commas


def text(value: Any) -> str:
    """`value` as it is shown, escaped; a dash for None."""
    return UNKNOWN if value is None else html.escape(str(value))


def number_html(value: Any) -> str:
    """The number with commas, escaped; a dash for None, nan and infinity."""
    return text(number_with_commas(value))


def quiet(sentence: str) -> str:
    """One line for what is not there."""
    return f'<p class="quiet">{text(sentence)}</p>'


def folded(title: str, content: str, opened: bool = False) -> str:
    """Content that a click shows; `title` is plain text."""
    return f"<details{' open' if opened else ''}><summary>{text(title)}</summary>{content}</details>"


def section(title: str, content: str) -> str:
    """A section of the page; `title` is plain text."""
    name = "".join(letter if letter.isalnum() else "-" for letter in title.lower())
    empty = content.startswith('<p class="quiet">') and content.endswith("</p>") and content.count("<p") == 1
    return f'<section id="{text(name)}"{" class=empty" if empty else ""}><h2>{text(title)}</h2>{content}</section>'


def legend(entries: Iterable[tuple[str, str, str]]) -> str:
    """(colour, style, label) of each curve; style: line, thin, area, dash or dot."""
    keys = "".join(
        f'<span><i class="key {style}" style="--c:var(--{colour})"></i>{text(label)}</span>'
        for colour, style, label in entries
    )
    return f'<p class="legend">{keys}</p>'


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1, kind: str = "") -> str:
    """A table of cells that are HTML already; the first `left` columns are words, the others numbers."""
    head = "".join(f"<th{' class=n' if index >= left else ''}>{text(title)}</th>" for index, title in enumerate(titles))
    body = "".join(
        "<tr>" + "".join(f"<td{' class=n' if i >= left else ''}>{cell}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def pairs(entries: Iterable[tuple[str, str]]) -> str:
    """Names, and beside them what they are: HTML already."""
    return '<dl class="pairs">' + "".join(f"<dt>{text(name)}</dt><dd>{value}</dd>" for name, value in entries) + "</dl>"

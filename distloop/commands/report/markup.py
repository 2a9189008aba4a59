"""Small pieces of HTML. `text` escapes; every text that comes from a run must pass through it."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from distloop.tracking.wording import UNKNOWN, number_with_commas


def text(value: Any) -> str:
    """The value as escaped text; a dash for None."""
    return UNKNOWN if value is None else html.escape(str(value))


def number_html(value: Any) -> str:
    """The number with commas, escaped; a dash for None, nan and infinity."""
    return text(number_with_commas(value))


def quiet(sentence: str) -> str:
    """A sentence in pale letters, for what a run does not have."""
    return f'<p class="quiet">{text(sentence)}</p>'


def folded(title: str, content: str, opened: bool = False) -> str:
    """Content that is hidden until a click on the title. `title` is plain text, `content` HTML."""
    return f"<details{' open' if opened else ''}><summary>{text(title)}</summary>{content}</details>"


def section(title: str, content: str) -> str:
    """A section of the page. `title` is plain text, `content` HTML."""
    name = "".join(letter if letter.isalnum() else "-" for letter in title.lower())
    empty = content.startswith('<p class="quiet">') and content.endswith("</p>") and content.count("<p") == 1
    return f'<section id="{text(name)}"{" class=empty" if empty else ""}><h2>{text(title)}</h2>{content}</section>'


def legend(entries: Iterable[tuple[str, str, str]]) -> str:
    """A legend. `entries`: (colour, style, label) of each curve; the style is line, thin, area, dash or dot."""
    keys = "".join(
        f'<span><i class="key {style}" style="--c:var(--{colour})"></i>{text(label)}</span>'
        for colour, style, label in entries
    )
    return f'<p class="legend">{keys}</p>'


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1, css_class: str = "") -> str:
    """A table. Cells are HTML. The first `left` columns hold words, the others numbers, which are aligned right."""
    alignments = ["" if index < left else " class=n" for index in range(len(titles))]
    head = "".join(f"<th{alignment}>{text(title)}</th>" for alignment, title in zip(alignments, titles, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{alignment}>{cell}</td>' for alignment, cell in zip(alignments, row, strict=True))}</tr>"
        for row in rows
    )
    body = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table class="{css_class}">{body}</table></div>'


def pairs(entries: Iterable[tuple[str, str]]) -> str:
    """A list of names with their values. Names are plain text, values HTML."""
    return '<dl class="pairs">' + "".join(f"<dt>{text(name)}</dt><dd>{value}</dd>" for name, value in entries) + "</dl>"

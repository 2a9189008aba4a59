"""A section of the page: data from a run, shown by a template.

Jinja escapes each text that comes from a run. Only the SVG of plots.py and the style sheet are marked as HTML.
"""

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
from markupsafe import Markup

from distloop.commands.report.plots import STATE_COLOURS, STYLE
from distloop.commands.report.read import Part
from distloop.run.accounts import goodput
from distloop.tracking.wording import UNKNOWN, file_size, long_duration, number_with_commas, percent, plural

# What a damaged file may raise. The section then says so; the other sections are not affected.
DAMAGED = (TypeError, KeyError, ValueError, AttributeError, IndexError, OverflowError, UndefinedError)


class NothingToShowError(Exception):
    """A section has no content; the message is a sentence that says why."""


class Section(NamedTuple):
    """A part of the page."""

    title: str
    template: str
    data: Callable[[Any], dict[str, Any]]
    """Returns the variables of the template. May raise NothingToShowError."""

    def render(self, subject: Any) -> tuple[str, Markup]:
        """(why the section has no content or "", its HTML) for a Record, or for the Comparison of several."""
        try:
            return "", Markup(environment().get_template(self.template).render(self.data(subject)))
        except NothingToShowError as reason:
            return str(reason), Markup()
        except DAMAGED as error:
            return f"This cannot be shown: a file is damaged ({type(error).__name__}: {error}).", Markup()


def content_of(part: Part) -> Any:
    """The content of a file. Raises NothingToShowError if it has none."""
    if part.problem:
        raise NothingToShowError(part.problem)
    return part.value


@functools.cache
def environment() -> Environment:
    """The templates, with wording.py's functions as filters. None becomes a dash."""
    templates = Environment(
        loader=FileSystemLoader(STYLE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: UNKNOWN if value is None else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "number": number_with_commas,
        "percent": percent,
        "duration": long_duration,
        "file_size": file_size,
        "plural": plural,
        "goodput": goodput,
        "as_setting": as_setting,
    }
    templates.globals |= {"STATE_COLOURS": STATE_COLOURS, "UNKNOWN": UNKNOWN}
    return templates


def as_setting(value: Any) -> str:
    """The value as a config file has it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)

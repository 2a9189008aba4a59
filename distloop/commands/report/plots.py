"""Plots as SVG, drawn by matplotlib without pyplot and display. Text stays text; colours become CSS variables."""

from __future__ import annotations

import functools
import io
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from markupsafe import Markup

from distloop.commands.report.rows import Floats
from distloop.tracking.wording import number_on_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours have the names that style.css gives them.
STYLE = Path(__file__).with_name("templates") / "style.css"
SERIES = ("blue", "red", "green", "orange", "pink", "sky", "violet", "brown", "olive", "black")
ACCOUNT_COLOURS = {
    "compute": "blue",
    "data": "orange",
    "validation": "green",
    "checkpoint": "pink",
    "start_up": "mark",
    "lost": "red",
}
STATE_COLOURS = {"finished": "green", "running": "blue", "starting": "sky", "stopped": "orange"}  # others: red

WIDTH, HEIGHT = 560, 232  # of a plot; the page scales it to its column
MOST_CELLS = 250  # per side of a confusion matrix
SPREAD = 30.0  # the axis becomes logarithmic if the largest value is more than so many times the median
SETTINGS_BY_COLOUR = {  # matplotlib's settings
    "ink": ("text.color",),
    "soft": ("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"),
    "mark": ("axes.edgecolor", "xtick.color", "ytick.color"),
    "line": ("grid.color",),
}


@functools.cache
def light_colours() -> dict[str, str]:
    """The colours on a light page: "#0072b2" for "blue"."""
    light, _, _ = STYLE.read_text(encoding="ascii").partition("@media")
    return dict(re.findall(r"--(\w+): (#\w{6})", light))


class Trace(NamedTuple):
    """A curve in a plot."""

    points: Floats
    """(steps, values): shape [2, points]."""
    colour: str
    """A name in style.css."""
    style: str = "line"
    """line | thin (light, for single steps)."""
    label: str = ""
    """For the legend; "" for a curve without."""


def draw_curves(
    traces: list[Trace], attempts: dict[int, int], last_step: int, logarithmic: bool | None = None, zero: bool = False
) -> Markup:
    """Curves against the step, as SVG.

    `attempts`: attempt -> the step after which it began. `logarithmic`: of the value axis; None: decided by the values.
    `zero`: the value axis begins at 0.
    """
    values = np.concatenate([trace.points[1] for trace in traces])
    values = values[np.isfinite(values)]

    def fill(axes: Axes) -> None:
        for (steps, numbers), colour, style, _ in traces:
            options: dict[str, Any] = {"linewidth": 1.7} if style == "line" else {"linewidth": 0.9, "alpha": 0.45}
            if len(steps) == 1 or (style == "line" and len(steps) <= 25):
                options |= {"marker": "o", "markersize": 3.6, "markeredgewidth": 0}
            axes.plot(steps, numbers, color=light_colours()[colour], **options)
        if not len(values):
            return
        if logarithmic if logarithmic is not None else _needs_logarithm(values):
            axes.set_yscale("log")
            _label_logarithm(axes)
        elif zero:
            axes.set_ylim(0, max(values.max() * 1.08, 1e-9))

    return _draw_against_step(fill, attempts, last_step)


def draw_shares(
    seconds: Floats, colours: list[str], attempts: dict[int, int], last_step: int, bars: int = 60
) -> Markup:
    """The shares of time accounts over the run as stacked bars, as SVG.

    `seconds`: shape [1 + accounts, intervals]; the last step of each interval, then the seconds of each account.
    """
    edges = np.linspace(0, last_step, min(bars, seconds.shape[1]) + 1)
    place = np.clip(np.searchsorted(edges, seconds[0], side="left") - 1, 0, len(edges) - 2)
    sums = np.stack([np.bincount(place, weights=row, minlength=len(edges) - 1) for row in seconds[1:]])
    totals = sums.sum(axis=0)
    shares = np.divide(sums, totals, out=np.zeros_like(sums), where=totals > 0) * 100
    levels = np.pad(np.cumsum(shares, axis=0), ((1, 0), (0, 0)))
    levels = np.pad(levels, ((0, 0), (0, 1)), mode="edge")  # the last bar ends at the last edge

    def fill(axes: Axes) -> None:
        for lower, upper, colour in zip(levels[:-1], levels[1:], colours, strict=True):
            axes.fill_between(edges, lower, upper, step="post", color=light_colours()[colour], linewidth=0)
        axes.set_ylim(0, 100)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")

    return _draw_against_step(fill, attempts, last_step)


def cell_of(classes: int) -> int:
    """How many classes, per side, one cell of a large matrix stands for: a page has too few pixels for each class."""
    return -(-classes // MOST_CELLS)


def draw_matrix(confusion: Floats) -> Markup:
    """A large confusion matrix, shape [classes, classes] with a row per label, as SVG.

    Right answers are blue, mistakes red, the deeper the larger their share of the label's samples. A cell that stands
    for several classes shows the largest share.
    """
    classes, cell = len(confusion), cell_of(len(confusion))
    totals = confusion.sum(axis=1, keepdims=True)
    shares = np.divide(confusion, totals, out=np.zeros_like(confusion), where=totals > 0)
    cells = -(-classes // cell)
    padded = np.pad(shares, (0, cells * cell - classes))
    largest = padded.reshape(cells, cell, cells, cell).max(axis=(1, 3))
    with _figure(WIDTH) as figure:
        from matplotlib.colors import to_rgb

        colours = np.zeros((cells, cells, 4))
        colours[..., :3] = to_rgb(light_colours()["red"])
        colours[np.arange(cells), np.arange(cells), :3] = to_rgb(light_colours()["blue"])
        colours[..., 3] = np.sqrt(largest)  # a root, so that rare mistakes stay visible
        axes = figure.add_axes((0.1, 0.09, 0.89, 0.89))
        end = cells * cell - 0.5
        axes.imshow(colours, interpolation="none", aspect="auto", extent=(-0.5, end, end, -0.5))
        axes.set(xlabel="prediction", ylabel="label")
        axes.grid(False)
        for side in axes.spines.values():
            side.set(visible=True, edgecolor=light_colours()["line"])
        axes.locator_params(integer=True)
        return _svg(figure)


@contextmanager
def _figure(height: float) -> Iterator[Figure]:
    """An empty figure, `height` points high. Within the context matplotlib has the report's settings."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # without its message about building a font cache
    import matplotlib
    from matplotlib.figure import Figure

    colours: Any = {key: light_colours()[name] for name, keys in SETTINGS_BY_COLOUR.items() for key in keys}
    with matplotlib.rc_context(colours, STYLE.with_name("plots.mplstyle")):
        yield Figure(figsize=(WIDTH / 72, height / 72))


def _draw_against_step(fill: Callable[[Axes], None], attempts: dict[int, int], last_step: int) -> Markup:
    """A plot against the step, as SVG; `fill` draws the curves into its axes."""
    with _figure(HEIGHT) as figure:
        from matplotlib.ticker import MaxNLocator

        axes = figure.add_axes((54 / WIDTH, 26 / HEIGHT, 1 - 64 / WIDTH, 1 - 44 / HEIGHT))
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 5, 10]))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: number_on_axis(value))
        fill(axes)
        axes.set_xlim(0, max(1, last_step) * 1.008)  # room to show a point at the end whole
        _mark_attempts(axes, attempts, max(1, last_step))
        return _svg(figure)


def _mark_attempts(axes: Axes, attempts: dict[int, int], last_step: int) -> None:
    """Draw a thin line where each attempt but the first began, with a label if there is room."""
    colours = light_colours()
    free_from = 0.0  # share of the axis from which no label is in the way
    opacity = 1.0 if len(attempts) < 12 else 0.4
    for number, step in sorted(attempts.items())[1:]:
        if step <= 0:
            continue
        axes.axvline(step, color=colours["mark"], linewidth=0.9, linestyle=(0, (2, 2)), zorder=0.5, alpha=opacity)
        label, place = (f"attempt {number}" if not free_from else str(number)), step / last_step
        if place >= free_from:
            side = "left" if place < 0.03 else "right" if place > 0.96 else "center"
            text: dict[str, Any] = {"color": colours["soft"], "fontsize": 10, "ha": side, "annotation_clip": False}
            axes.annotate(label, (place, 1), (0, 4), "axes fraction", "offset points", **text)
            free_from = place + (0.14 if not free_from else 0.05)


def _needs_logarithm(values: Floats) -> bool:
    """Whether a linear axis would show most of the values as a flat line at the bottom."""
    return bool(len(values) and values.min() > 0 and values.max() > SPREAD * np.median(values))


def _label_logarithm(axes: Axes) -> None:
    """Label powers of ten; in a short range also 2 and 5 times these, so that some labels are always visible."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axes.get_ylim()
    decades = np.log10(high / low)
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if decades < 2.5 else (1,), numticks=8))
    axes.yaxis.set_major_formatter(lambda value, _: number_on_axis(value))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _svg(figure: Figure) -> Markup:
    """The figure as an <svg> element for HTML, without name spaces and style sheet, which HTML does not need."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    _, tag, text = stream.getvalue().partition("<svg")
    text = re.sub(r'<svg[^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1">', tag + text, count=1)
    text = re.sub(r"<style.*?</style>|<metadata.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"font-family:[^;\"]*;?", "", text)
    text = re.sub(r"<path[^>]*>", lambda path: re.sub(r"-?\d+\.\d{3,}", _two_decimals, path[0]), text)
    text = text.replace("xlink:href", "href")
    for name, colour in light_colours().items():
        text = text.replace(colour, f"var(--{name})")
    return Markup(re.sub(r"\s*\n\s*", "\n", text))


def _two_decimals(number: re.Match[str]) -> str:
    """A hundredth of a pixel is enough."""
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")

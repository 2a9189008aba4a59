"""Several runs side by side: a table of their settings and results, curves in common plots, time."""

import collections
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distloop.commands.ranking import Ranking, rank
from distloop.commands.reading import metrics_in, read_run
from distloop.commands.report.curve_plots import Plot
from distloop.commands.report.curves import MOST_OWN, Curve
from distloop.commands.report.overview import median_rate
from distloop.commands.report.plots import SERIES, Trace, draw_curves
from distloop.commands.report.read import Record, read_record, total_seconds
from distloop.commands.report.resources import time_bars
from distloop.commands.report.sections import NothingToShowError

MOST_BARS = 30
FEW_SETTINGS = 4  # up to so many settings stand beside the name; more come after the results


class Comparison(NamedTuple):
    """Several runs, the best first."""

    ranking: Ranking
    records: list[Record]
    colours: list[str]
    """The colour of each run's curves."""


def compare(paths: list[Path]) -> Comparison:
    """The runs ranked by the metric by which most of them choose their best validation; by name if there is none."""
    runs = [read_run(path) for path in paths]
    rules = [run.best_rule[0] for run in runs if run.best_rule]
    ranking = rank(runs, max(dict.fromkeys(rules), key=rules.count) if rules else "name")
    colours = [*SERIES, *["mark"] * len(runs)][: len(runs)]
    return Comparison(ranking, [read_record(run.path) for run in ranking.runs], colours)


def overview(comparison: Comparison) -> dict[str, Any]:
    """The variables of top_of_several.html."""
    states = collections.Counter(run.state for run in comparison.ranking.runs)
    return {"states": states, "ranking": comparison.ranking}


def ranking_table(comparison: Comparison) -> dict[str, Any]:
    """The variables of ranking.html."""
    keys = list(dict.fromkeys(key for settings in comparison.ranking.settings for key in settings))
    lasts = [metrics_in(record.metrics.last_validation) for record in comparison.records]
    return comparison._asdict() | {
        "keys": keys,
        "are_settings_first": len(keys) <= FEW_SETTINGS,
        "lasts": lasts,
        "names": list(dict.fromkeys(name for last in lasts for name in last)),
        "rates": list(map(median_rate, comparison.records)),
    }


def curves(comparison: Comparison) -> dict[str, Any]:
    """The variables of plots.html."""
    _, records, colours = comparison
    names = list(dict.fromkeys(name for record in records for name in record.metrics.validation))
    names.sort(key=lambda name: name != "loss")
    validation = [[record.metrics.validation.get(name) for record in records] for name in names]
    losses = [record.metrics.train.get("running_loss") for record in records]
    rates = [record.metrics.train.get("lr") for record in records]
    own = list(dict.fromkeys(title for record in records for title in record.metrics.own))[:MOST_OWN]
    plots = [
        *(_plot(comparison, f"Validation {name}", of_runs) for name, of_runs in zip(names, validation, strict=True)),
        _plot(comparison, "Training loss, running mean", losses, means=True),
        _plot(comparison, "Learning rate", rates, logarithmic=False),
        *(_plot(comparison, title, [record.metrics.own.get(title) for record in records], means=True) for title in own),
    ]
    legend = [(colour, "line", record.run.name) for colour, record in zip(colours, records, strict=True)]
    note = ""
    if len(records) > len(SERIES):
        legend = [*legend[: len(SERIES)], ("mark", "line", f"the other {len(records) - len(SERIES)}")]
        note = f"Only the first {len(SERIES)} runs of the ranking have colours of their own."
    without = ", ".join(record.run.name for record in records if record.metrics.problem)
    empty = f"Without any rows in metrics.jsonl: {without}." if without else ""
    return {"legend": legend, "plots": list(filter(None, plots)), "notes": [("note", note), ("quiet", empty)]}


def time_accounts(comparison: Comparison) -> dict[str, Any]:
    """The variables of time_of_several.html."""
    _, records, colours = comparison
    pairs = zip(records, colours, strict=True)
    bars = [(record.run.name, colour, record.seconds) for record, colour in pairs if record.seconds]
    if not bars:
        raise NothingToShowError("None of these runs has a time.json with seconds.")
    longest = max(sum(seconds.values()) for _, _, seconds in bars)
    return time_bars(bars[:MOST_BARS], total_seconds(seconds for *_, seconds in bars), longest) | {
        "runs": len(bars),
        "without": [record.run.name for record in records if not record.seconds],
    }


def _plot(
    comparison: Comparison, title: str, curves: list[Curve | None], means: bool = False, logarithmic: bool | None = None
) -> Plot | None:
    """A plot of one curve per run; None if no run has any. The best run is drawn last, over the others."""
    points = [(curve.mean() if means else curve.all()) if curve else np.zeros((2, 0)) for curve in curves]
    pairs = zip(points, comparison.colours, strict=True)
    traces = [Trace(each, colour) for each, colour in pairs if np.isfinite(each[1]).any()]
    if not traces:
        return None
    last_step = max(record.metrics.last_step for record in comparison.records)
    return Plot(title, draw_curves(traces[::-1], {}, last_step, logarithmic))

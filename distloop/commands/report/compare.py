"""Several runs side by side: a table of their settings and results, curves in common plots, time."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np

from distloop.commands.ranking import Ranking, rank
from distloop.commands.reading import Run, metrics_in, read_run
from distloop.commands.report.markup import legend, number_html, quiet, section, table, text
from distloop.commands.report.overview import median_rate
from distloop.commands.report.plots import Trace, draw_curves
from distloop.commands.report.read import Record, read_record
from distloop.commands.report.resources import account_colours, account_title, bar
from distloop.commands.report.rows import Floats
from distloop.commands.report.style import SERIES, STATE_COLOURS
from distloop.run.accounts import goodput
from distloop.tracking.wording import UNKNOWN, long_duration, percent

MOST_BARS = 30
FEW_SETTINGS = 4  # up to so many settings stand beside the name; more come after the results


def comparison(paths: list[Path]) -> str:
    """The body of the page for several runs."""
    ranking = _rank([read_run(path) for path in paths])
    records = [read_record(run.path) for run in ranking.runs]
    colours = [SERIES[index] if index < len(SERIES) else "mark" for index in range(len(records))]
    facts = [f"{count} {state}" for state, count in collections.Counter(run.state for run in ranking.runs).items()]
    facts.append(f"the best {ranking.by} first" if ranking.is_metric else f"by {ranking.by}")
    return (
        f'<div class="top"><h1>{len(records)} runs</h1></div>'
        f'<p class="facts">{"".join(f"<span>{text(fact)}</span>" for fact in facts)}</p>'
        + section("Ranking", _table(ranking, records, colours))
        + section("Curves", _curves(records, colours))
        + section("Time", _time(records, colours))
    )


def _rank(runs: list[Run]) -> Ranking:
    """The runs ranked by the metric by which most of them choose their best validation; by name if there is none."""
    rules = [run.best_rule[0] for run in runs if run.best_rule]
    metric = max(dict.fromkeys(rules), key=rules.count) if rules else None
    return rank(runs, metric or "name")


def _table(ranking: Ranking, records: list[Record], colours: list[str]) -> str:
    keys = list(dict.fromkeys(key for settings in ranking.settings for key in settings))
    settings_first = len(keys) <= FEW_SETTINGS
    lasts = [metrics_in(record.metrics.last_validation) for record in records]
    names = list(dict.fromkeys(name for last in lasts for name in last))
    rows = []
    for index, record in enumerate(records):
        run, value, last = record.run, ranking.values[index], lasts[index]
        settings = [f"<code>{text(ranking.settings[index].get(key))}</code>" for key in keys]
        state = STATE_COLOURS.get(run.state, "red")
        row = [
            number_html(ranking.place(index)),
            f'<span class="one"><i class="key dot" style="--c:var(--{colours[index]})"></i>'
            f'<span class="first">{text(run.name)}</span></span>',
            *(settings if settings_first else []),
            f'<span class="badge" style="--c:var(--{state})">{text(run.state)}</span>',
        ]
        if ranking.is_metric:
            row.append(f"<b>{number_html(value[0])}</b>" if value else UNKNOWN)
            row.append(number_html(value[1]) if value else UNKNOWN)
        row += [number_html(last.get(name)) for name in names]
        row += [
            f"{number_html(max(run.step or 0, record.metrics.last_step))} / {number_html(run.total_steps)}",
            long_duration(sum(record.seconds.values()) or None),
            percent(goodput(record.seconds)),
            number_html(median_rate(record)),
            *([] if settings_first else settings),
        ]
        rows.append(row)
    best = [f"best {ranking.by}", "at step"] if ranking.is_metric else []
    titles = ["#", "run", *(keys if settings_first else []), "state", *best, *(f"last {name}" for name in names)]
    titles += ["steps", "wall time", "goodput", "samples/s", *([] if settings_first else keys)]
    note = "" if keys else '<p class="note">Nothing that is trained differs in their configs.</p>'
    return table(titles, rows, left=3 + (len(keys) if settings_first else 0), css_class="full") + note


def _curves(records: list[Record], colours: list[str]) -> str:
    last_step = max(record.metrics.last_step for record in records)
    names = list(dict.fromkeys(name for record in records for name in record.metrics.validation))
    names.sort(key=lambda name: name != "loss")
    plots = []
    for name in names:
        curves = [record.metrics.validation.get(name) for record in records]
        points = [curve.all() if curve else None for curve in curves]
        plots.append(_plot(f"Validation {name}", points, colours, last_step))
    for key, title in (("running_loss", "Training loss, running mean"), ("lr", "Learning rate")):
        curves = [record.metrics.train.get(key) for record in records]
        is_noisy = key == "running_loss"
        points = [(curve.mean() if is_noisy else curve.all()) if curve else None for curve in curves]
        plots.append(_plot(title, points, colours, last_step, logarithmic=False if key == "lr" else None))
    keys = [(colour, "line", record.run.name) for colour, record in zip(colours, records, strict=True)]
    note = ""
    if len(records) > len(SERIES):
        keys = [*keys[: len(SERIES)], ("mark", "line", f"the other {len(records) - len(SERIES)}")]
        note = f'<p class="note">Only the first {len(SERIES)} runs of the ranking have colours of their own.</p>'
    without = [record.run.name for record in records if record.metrics.problem]
    note += quiet(f"Without any rows in metrics.jsonl: {', '.join(without)}.") if without else ""
    html = f'<div class="plots">{"".join(plots)}</div>' if any(plots) else ""
    return f"{legend(keys)}{html}{note}"


def _plot(
    title: str, points: list[Floats | None], colours: list[str], last_step: int, logarithmic: bool | None = None
) -> str:
    """A plot of one curve per run, or "" if no run has any. The best run is drawn last, over the others."""
    pairs = zip(points, colours, strict=True)
    traces = [Trace(curve, colour) for curve, colour in pairs if curve is not None and np.isfinite(curve[1]).any()]
    if not traces:
        return ""
    svg = draw_curves(traces[::-1], {}, last_step, logarithmic)
    return f'<div><h3>{text(title)}</h3><p class="legend"></p>{svg}</div>'


def _time(records: list[Record], colours: list[str]) -> str:
    having = [(record, colour) for record, colour in zip(records, colours, strict=True) if record.seconds]
    if not having:
        return quiet("None of these runs has a time.json with seconds.")
    names = list(dict.fromkeys(name for record, _ in having for name, value in record.seconds.items() if value > 0))
    accounts = account_colours(names)
    longest = max(sum(record.seconds.values()) for record, _ in having)
    bars = [bar(record.run.name, record.seconds, accounts, longest, colour) for record, colour in having[:MOST_BARS]]
    without = [record.run.name for record in records if not record.seconds]
    note = f" The first {MOST_BARS} of {len(having)} runs." if len(having) > MOST_BARS else ""
    note += f" Without time.json: {', '.join(without)}." if without else ""
    return (
        legend((accounts[name], "area", account_title(name)) for name in names)
        + f'<div class="bars">{"".join(bars)}</div><p class="note">Beside each: its wall time and its goodput, the '
        f"share of it in compute and data of steps that counted.{text(note)}</p>"
    )

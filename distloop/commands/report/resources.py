"""The sections about the resources of a run: time of each attempt, throughput, memory. Each returns HTML."""

from __future__ import annotations

from typing import Any

import numpy as np

from distloop.commands.report.markup import folded, legend, number_html, quiet, table, text
from distloop.commands.report.plots import Trace, draw_shares
from distloop.commands.report.read import Record, accounts
from distloop.commands.report.style import ACCOUNT_COLOURS, SERIES
from distloop.commands.report.training import plot_of, with_mean
from distloop.run.accounts import goodput
from distloop.tracking.wording import UNKNOWN, long_duration, percent

MOST_RANKS = 8  # up to so many ranks have a curve of memory each; else the plot shows the most and the least
MOST_ATTEMPTS = 12  # with more, the table of attempts is folded


def resources(record: Record) -> str:
    """Throughput, time accounts and memory over the run."""
    metrics, plots, missing = record.metrics, [], []
    if metrics.problem:
        return quiet(metrics.problem)
    rate = metrics.train.get("samples_per_second")
    if rate is not None and rate.points:
        plots.append(plot_of(record, "Samples per second", with_mean(rate, "blue"), logarithmic=False, zero=True))
    else:
        missing.append("the throughput")
    seconds = np.concatenate(metrics.seconds, axis=1) if metrics.seconds else np.zeros((5, 0))
    if seconds[1:].sum() > 0:
        order = {"compute": 2, "data": 1, "validation": 3, "checkpoint": 4}  # rows of `seconds`
        colours = [ACCOUNT_COLOURS[name] for name in order]
        svg = draw_shares(seconds[[0, *order.values()]], colours, record.attempts, metrics.last_step)
        keys = legend((ACCOUNT_COLOURS[name], "area", name) for name in order)
        plots.append(f"<div><h3>Time of the steps</h3>{keys}{svg}</div>")
    else:
        missing.append("where the time went")
    if metrics.memory:
        plots.append(_memory(record))
    else:
        missing.append("the memory")
    note = quiet(f"metrics.jsonl says nothing of {' and '.join(missing)}.") if missing else ""
    return f'<div class="plots">{"".join(plots)}</div>{note}'


def time_accounts(record: Record) -> str:
    """The wall time of each attempt by account."""
    if record.time.problem:
        return quiet(record.time.problem)
    if not record.time.value:
        return quiet("time.json knows of no attempt yet.")
    names = [name for name, seconds in record.seconds.items() if seconds > 0]
    colours = account_colours(names)
    longest = max(sum(accounts(attempt).values()) for attempt in record.time.value)
    bars, rows = [], []
    for attempt in record.time.value:
        seconds = accounts(attempt)
        bars.append(bar(f"attempt {attempt.get('attempt', '?')}", seconds, colours, longest))
        began = f'<span class="one">{text(_date(attempt.get("began")))}</span>'
        processes = f"{number_html(attempt.get('world_size'))} × {text(attempt.get('device'))}"
        first, last = number_html(attempt.get("first_step")), number_html(attempt.get("step"))
        steps = f"<span class='one'>{first} → {last}</span>"
        cells = [number_html(attempt.get("attempt")), text(attempt.get("state")), began, processes, steps]
        rows.append([*cells, *_cells_of_seconds(seconds, names)])
    if len(rows) > 1:
        rows.append(["all", *4 * [""], *(f"<b>{cell}</b>" for cell in _cells_of_seconds(record.seconds, names))])
    titles = ["attempt", "state", "began", "processes", "steps", *map(account_title, names)]
    details = table([*titles, "wall time", "goodput"], rows, left=5, css_class="full")
    last_bars = "".join(bars[-MOST_ATTEMPTS:])
    note = f"The last {MOST_ATTEMPTS} of {len(bars)} attempts. " if len(bars) > MOST_ATTEMPTS else ""
    details = folded(f"All {len(bars)} attempts", details) if note else details
    return (
        legend((colours[name], "area", account_title(name)) for name in names)
        + f'<div class="bars">{last_bars}</div>{details}'
        f'<p class="note">{note}Goodput: the share of the wall time in compute and data of steps that counted. '
        "Lost: work that was done again after a restart. Seconds where no unit is given.</p>"
    )


def bar(name: str, seconds: dict[str, float], colours: dict[str, str], longest: float, dot: str = "") -> str:
    """A row with a name, a bar of time accounts and the total.

    `longest`: the seconds of a bar over the whole width. `dot`: the colour of a point before the name, or "".
    """
    parts = "".join(
        f'<i style="--c:var(--{colours[account]});width:{100 * value / longest:.3f}%" '
        f'title="{text(account_title(account))} {long_duration(value)}"></i>'
        for account, value in seconds.items()
        if account in colours and longest > 0
    )
    total = f"{long_duration(sum(seconds.values()))} · {percent(goodput(seconds))}" if seconds else UNKNOWN
    point = f'<i style="--c:var(--{dot})"></i>' if dot else ""
    return (
        f'<span class="name">{point}{text(name)}</span><span class="bar">{parts}</span>'
        f'<span class="value">{total}</span>'
    )


def account_colours(names: list[str]) -> dict[str, str]:
    """account -> colour. Accounts of another version get a colour that is left."""
    others = iter([name for name in SERIES if name not in ACCOUNT_COLOURS.values()] * len(names))
    return {name: ACCOUNT_COLOURS.get(name) or next(others) for name in names}


def account_title(name: str) -> str:
    """start_up -> start-up."""
    return name.replace("_", "-")


def _cells_of_seconds(seconds: dict[str, float], names: list[str]) -> list[str]:
    """The seconds of each account, the wall time and the goodput."""
    accounts_of_names = [f"{seconds[name]:,.1f}" if name in seconds else UNKNOWN for name in names]
    return [*accounts_of_names, long_duration(sum(seconds.values())), percent(goodput(seconds))]


def _memory(record: Record) -> str:
    """The plot of memory. The number of ranks may change between attempts."""
    blocks = record.metrics.memory
    ranks = max(len(block) for block in blocks) - 1
    padded = [np.pad(block, ((0, ranks + 1 - len(block)), (0, 0)), constant_values=np.nan) for block in blocks]
    steps, peaks = np.split(np.concatenate(padded, axis=1), [1])
    if ranks <= MOST_RANKS:
        traces = [(Trace(np.vstack([steps, row]), SERIES[rank]), f"rank {rank}") for rank, row in enumerate(peaks)]
    else:
        most, least = np.fmax.reduce(peaks), np.fmin.reduce(peaks)
        traces = [(Trace(np.vstack([steps, most]), "red"), f"the most of {ranks} ranks")]
        traces.append((Trace(np.vstack([steps, least]), "blue"), "the least"))
    return plot_of(record, "Peak memory in GiB", traces, logarithmic=False, zero=True)


def _date(moment: Any) -> str | None:
    """2026-11-22 11:07 of an ISO 8601 time."""
    return moment[:16].replace("T", " ") if isinstance(moment, str) else None

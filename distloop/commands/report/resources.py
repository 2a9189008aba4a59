"""The sections about the resources of a run: time of each attempt, throughput, memory."""

from typing import Any

import numpy as np

from distloop.commands.report.curve_plots import Plot, plot_of, with_mean
from distloop.commands.report.plots import ACCOUNT_COLOURS, SERIES, Trace, draw_shares
from distloop.commands.report.read import Record, accounts
from distloop.commands.report.sections import NothingToShowError, content_of

MOST_RANKS = 8  # up to so many ranks have a curve of memory each; else the plot shows the most and the least
MOST_ATTEMPTS = 12  # with more, the table of attempts is folded


def resources(record: Record) -> dict[str, Any]:
    """Throughput, time accounts and memory over the run: the variables of plots.html."""
    metrics, plots, missing = record.metrics, [], []
    if metrics.problem:
        raise NothingToShowError(metrics.problem)
    rate = metrics.train.get("samples_per_second")
    if rate is not None and rate.points:
        plots.append(plot_of(record, "Samples per second", with_mean(rate), logarithmic=False, zero=True))
    else:
        missing.append("the throughput")
    seconds = np.concatenate(metrics.seconds, axis=1) if metrics.seconds else np.zeros((5, 0))
    if seconds[1:].sum() > 0:
        order = {"compute": 2, "data": 1, "validation": 3, "checkpoint": 4}  # rows of `seconds`
        colours = [ACCOUNT_COLOURS[name] for name in order]
        svg = draw_shares(seconds[[0, *order.values()]], colours, record.attempts, metrics.last_step)
        plots.append(Plot("Time of the steps", svg, [(ACCOUNT_COLOURS[name], "area", name) for name in order]))
    else:
        missing.append("where the time went")
    if metrics.memory:
        plots.append(_memory(record))
    else:
        missing.append("the memory")
    note = f"metrics.jsonl says nothing of {' and '.join(missing)}." if missing else ""
    return {"plots": plots, "notes": [("quiet", note)]}


def time_accounts(record: Record) -> dict[str, Any]:
    """The wall time of each attempt by account: the variables of time.html."""
    attempts = content_of(record.time)
    if not attempts:
        raise NothingToShowError("time.json knows of no attempt yet.")
    bars = [(f"attempt {attempt.get('attempt', '?')}", "", accounts(attempt)) for attempt in attempts]
    longest = max(sum(seconds.values()) for *_, seconds in bars)
    return time_bars(bars[-MOST_ATTEMPTS:], record.seconds, longest) | {
        "attempts": [(attempt, accounts(attempt)) for attempt in attempts],
        "totals": record.seconds,
        "is_folded": len(attempts) > MOST_ATTEMPTS,
    }


def time_bars(
    bars: list[tuple[str, str, dict[str, float]]], totals: dict[str, float], longest: float
) -> dict[str, Any]:
    """The variables of the macro time_bars.

    `bars`: (name, colour of the point before it or "", account -> seconds). `totals`: account -> seconds of all bars.
    `longest`: the seconds of a bar over the whole width.
    """
    names = [name for name, value in totals.items() if value > 0]
    # Accounts of another version get a colour that is left.
    others = iter([name for name in SERIES if name not in ACCOUNT_COLOURS.values()] * len(names))
    colours = {name: ACCOUNT_COLOURS.get(name) or next(others) for name in names}
    return {"bars": bars, "colours": colours, "longest": longest}


def _memory(record: Record) -> Plot:
    """The plot of memory. The number of ranks may change between attempts."""
    blocks = record.metrics.memory
    ranks = max(len(block) for block in blocks) - 1
    padded = [np.pad(block, ((0, ranks + 1 - len(block)), (0, 0)), constant_values=np.nan) for block in blocks]
    steps, peaks = np.split(np.concatenate(padded, axis=1), [1])
    if ranks <= MOST_RANKS:
        curves = [(row, SERIES[rank], f"rank {rank}") for rank, row in enumerate(peaks)]
    else:
        most, least = np.fmax.reduce(peaks), np.fmin.reduce(peaks)
        curves = [(most, "red", f"the most of {ranks} ranks"), (least, "blue", "the least")]
    traces = [Trace(np.vstack([steps, values]), colour, label=label) for values, colour, label in curves]
    return plot_of(record, "Peak memory in GiB", traces, logarithmic=False, zero=True)

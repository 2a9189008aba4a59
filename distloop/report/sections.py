"""The sections of one run that show how it went: overview, curves, time. Each gives HTML."""

from __future__ import annotations

from typing import Any

import numpy as np

from distloop.report import markup
from distloop.report.curves import Curve

from distloop.report.markup import figure, legend, percent, quiet, span_of, table, text
from distloop.report.plots import Line, draw_lines, draw_shares
from distloop.report.read import Record, accounts, goodput
from distloop.report.rows import Floats
from distloop.report.style import ACCOUNT_COLOURS, SERIES, STATE_COLOURS
from distloop.runs import metrics_in

MOST_RANKS = 8  # with a curve of memory each; of more the most and the least
MOST_ATTEMPTS = 12  # rows of a table before the others are folded


def overview(record: Record) -> str:
    """Name, state and the few numbers that matter most."""
    run, environment = record.run, record.environment.value or {}
    colour = STATE_COLOURS.get(run.state, "red")
    head = (
        f'<div class="top"><h1>{text(run.name)}</h1>'
        f'<span class="badge" style="--c:var(--{colour})">{text(run.state)}</span></div>'
    )
    commit = environment.get("git_commit")
    changed = len(environment.get("git_changes") or [])
    facts = [
        _settings_in_short(record),
        f"world size {environment['world_size']}" if environment.get("world_size") else "",
        _devices(record),
        f"attempt {run.attempt}" if (run.attempt or 0) > 1 else "",
        f"commit {str(commit)[:10]}" + (f" with {changed} uncommitted changes" if changed else "") if commit else "",
    ]
    head += '<p class="facts">' + "".join(f"<span>{text(fact)}</span>" for fact in facts if fact) + "</p>"
    if run.reason and run.state not in ("finished", "running"):
        head += f'<p class="reason" style="--c:var(--{colour})">{text(run.reason.strip())}</p>'
    return head + '<div class="tiles">' + "".join(_tile(*tile) for tile in _tiles(record)) + "</div>"


def curves(record: Record) -> str:
    """Loss, metrics, learning rate, gradient norm."""
    metrics, plots = record.metrics, []
    if metrics.problem:
        return quiet(metrics.problem)
    train, validation = metrics.train, metrics.validation
    loss = _step_loss(record)
    if "loss" in validation:
        loss.append((Line(validation["loss"].all(), "red"), "validation"))
    plots.append(_plot(record, "Loss", loss, _not_numbers(train.get("loss"), "training losses")))
    for name, curve in validation.items():
        if name != "loss" and np.isfinite(curve.all()[1]).any():
            plots.append(_plot(record, f"Validation {name}", [(Line(curve.all(), "red"), "")], _best(record, name)))
    if "lr" in train:
        plots.append(_plot(record, "Learning rate", [(Line(train["lr"].all(), "blue"), "")], logarithmic=False))
    if "gradient_norm" in train:
        note = _not_numbers(train["gradient_norm"], "gradient norms")
        plots.append(_plot(record, "Gradient norm", _with_mean(train["gradient_norm"], "blue"), note))
    notes = quiet("No validation yet.") if not validation else ""
    if metrics.damaged:
        notes += f'<p class="note">{metrics.damaged:,} lines of metrics.jsonl are no rows, and are left out.</p>'
    return f'<div class="plots">{"".join(plots)}</div>{notes}'


def resources(record: Record) -> str:
    """Throughput, where the time went over the run, memory."""
    metrics, plots, missing = record.metrics, [], []
    if metrics.problem:
        return quiet(metrics.problem)
    rate = metrics.train.get("samples_per_second")
    if rate is not None and rate.points:
        plots.append(_plot(record, "Samples per second", _with_mean(rate, "blue"), logarithmic=False, zero=True))
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
    """What each attempt's wall time went into."""
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
        rows.append(
            [
                figure(attempt.get("attempt")),
                text(attempt.get("state")),
                f'<span class="one">{text(_date(attempt.get("began")))}</span>',
                f"{figure(attempt.get('world_size'))} × {text(attempt.get('device'))}",
                f"<span class='one'>{figure(attempt.get('first_step'))} → {figure(attempt.get('step'))}</span>",
                *(seconds_shown(seconds.get(name)) for name in names),
                span_of(sum(seconds.values())),
                percent(goodput(seconds)),
            ]
        )
    if len(rows) > 1:
        total = record.seconds
        rows.append(
            [
                "all",
                "",
                "",
                "",
                "",
                *(f"<b>{seconds_shown(total.get(name))}</b>" for name in names),
                f"<b>{span_of(sum(total.values()))}</b>",
                f"<b>{percent(goodput(total))}</b>",
            ]
        )
    titles = ["attempt", "state", "began", "processes", "steps", *(_account(name) for name in names)]
    details = table([*titles, "wall time", "goodput"], rows, left=5, kind="full")
    shown = "".join(bars[-MOST_ATTEMPTS:])
    note = f"The last {MOST_ATTEMPTS} of {len(bars)} attempts. " if len(bars) > MOST_ATTEMPTS else ""
    details = markup.folded(f"All {len(bars)} attempts", details) if note else details
    return (
        legend((colours[name], "area", _account(name)) for name in names) + f'<div class="bars">{shown}</div>{details}'
        f'<p class="note">{note}Goodput: the share of the wall time in compute and data of steps that counted. '
        "Lost: work that was done again after a restart. Seconds where no unit is given.</p>"
    )


def bar(name: str, seconds: dict[str, float], colours: dict[str, str], longest: float, dot: str = "") -> str:
    """A row of stacked time accounts, as long as its share of the longest; `dot`: the colour of a point before it."""
    parts = "".join(
        f'<i style="--c:var(--{colours[account]});width:{100 * value / longest:.3f}%" '
        f'title="{text(_account(account))} {span_of(value)}"></i>'
        for account, value in seconds.items()
        if account in colours and longest > 0
    )
    total = f"{span_of(sum(seconds.values()))} · {percent(goodput(seconds))}" if seconds else markup.UNKNOWN
    point = f'<i style="--c:var(--{dot})"></i>' if dot else ""
    return f'<span class="name">{point}{text(name)}</span><span class="bar">{parts}</span><span class="value">{total}</span>'


def account_colours(names: list[str]) -> dict[str, str]:
    """Each account's colour; those of another version get what is left."""
    others = iter([name for name in SERIES if name not in ACCOUNT_COLOURS.values()] * len(names))
    return {name: ACCOUNT_COLOURS.get(name) or next(others) for name in names}


def seconds_shown(value: float | None) -> str:
    return markup.UNKNOWN if value is None else f"{value:,.1f}"


def median_rate(record: Record) -> float | None:
    """The middle of the run's samples per second."""
    curve = record.metrics.train.get("samples_per_second")
    means = curve.mean()[1] if curve else np.zeros(0)
    means = means[np.isfinite(means)]
    return float(np.median(means)) if len(means) else None


def _tile(value: str, label: str) -> str:
    return f'<div class="tile"><b>{value}</b><span>{text(label)}</span></div>'


def _tiles(record: Record) -> list[tuple[str, str]]:
    """(value as HTML, label) of the big numbers."""
    run, last = record.run, metrics_in(record.metrics.last_validation)
    step = max(run.step or 0, record.metrics.last_step) if run.state in ("running", "gone") else run.step
    tiles = [(figure(step), f"step of {figure(run.total_steps)}")]
    rule = run.best_rule
    if rule and run.best and rule[0] in run.best:
        tiles.append((figure(run.best[rule[0]]), f"best {rule[0]}, step {figure(run.best.get('step'))}"))
    chosen = [name for name in dict.fromkeys([rule[0] if rule else "", "loss", *last]) if name in last]
    for name in chosen[:2]:
        tiles.append((figure(last[name]), "last validation loss" if name == "loss" else f"last {name}"))
    if not last:
        trained = record.metrics.last_train.get("running_loss")
        tiles.append((figure(trained), "running training loss; no validation yet"))
    tiles.append((percent(goodput(record.seconds)), "goodput"))
    attempts = max(len(record.time.value or []), run.attempt or 0)
    wall = sum(record.seconds.values()) or None
    tiles.append((span_of(wall), f"wall time, {attempts} attempt{'s' if attempts != 1 else ''}"))
    tiles.append((figure(median_rate(record)), "samples per second"))
    return [tile for tile in tiles if tile[0] != markup.UNKNOWN]


def _settings_in_short(record: Record) -> str:
    config = record.config.value or {}

    def name(section: str) -> str:
        value = config.get(section)
        return str(value.get("name", "")) if isinstance(value, dict) else ""

    return f"{name('model')} on {name('data')}" if name("model") and name("data") else ""


def _devices(record: Record) -> str:
    return ", ".join(dict.fromkeys(str(a["device"]) for a in record.time.value or [] if a.get("device")))


def _plot(
    record: Record,
    title: str,
    lines: list[tuple[Line, str]],
    note: str = "",
    logarithmic: bool | None = None,
    zero: bool = False,
) -> str:
    """A plot with its title, the legend of its labelled lines and a note."""
    usable = [(line, label) for line, label in lines if line.curve.shape[1]]
    if not usable:
        return f'<div><h3>{text(title)}</h3><p class="legend"></p>{quiet("Nothing is known of it.")}</div>'
    svg = draw_lines(
        [line for line, _ in usable], record.attempts, record.metrics.last_step, logarithmic=logarithmic, zero=zero
    )
    keys = legend((line.colour, line.style, label) for line, label in usable if label)
    if all(not label for _, label in usable):
        keys, note = f'<p class="legend">{text(note)}</p>', ""
    if note:
        svg = f'<div>{svg}<p class="note">{text(note)}</p></div>'
    return f"<div><h3>{text(title)}</h3>{keys}{svg}</div>"


def _step_loss(record: Record) -> list[tuple[Line, str]]:
    """The curves of the training loss."""
    metrics, lines = record.metrics, []
    if "loss" in metrics.train:
        lines.append((Line(metrics.train["loss"].all(), "blue", "thin"), "training, single steps"))
    if metrics.epochs.points:
        epochs = metrics.epochs.all()
        lines.append((Line(epochs, "blue"), "training, mean of each epoch"))
    if "running_loss" in metrics.train and metrics.epochs.all().shape[1] < 3:
        lines.append((Line(metrics.train["running_loss"].mean(), "sky"), "training, running mean of the epoch"))
    return lines


def _with_mean(curve: Curve, colour: str) -> list[tuple[Line, str]]:
    """A noisy curve light, and its means over it; one with few points as it is."""
    points, means = curve.all(), curve.mean()
    if points.shape[1] < 100:
        return [(Line(points, colour), "")]
    finite = means[:, np.isfinite(means[1])]
    parts: list[Floats] = [part.mean(axis=1) for part in np.array_split(finite, 100, axis=1) if part.shape[1]]
    return [(Line(points, colour, "thin"), "logged steps"), (Line(np.array(parts).reshape(-1, 2).T, colour), "mean")]


def _memory(record: Record) -> str:
    blocks = record.metrics.memory
    ranks = max(len(block) for block in blocks) - 1
    padded = [np.pad(block, ((0, ranks + 1 - len(block)), (0, 0)), constant_values=np.nan) for block in blocks]
    steps, peaks = np.split(np.concatenate(padded, axis=1), [1])
    if ranks <= MOST_RANKS:
        each = [(Line(np.vstack([steps, row]), SERIES[rank]), f"rank {rank}") for rank, row in enumerate(peaks)]
    else:
        most, least = np.fmax.reduce(peaks), np.fmin.reduce(peaks)
        each = [(Line(np.vstack([steps, most]), "red"), f"the most of {ranks} ranks")]
        each.append((Line(np.vstack([steps, least]), "blue"), "the least"))
    return _plot(record, "Peak memory in GiB", each, logarithmic=False, zero=True)


def _not_numbers(curve: Curve | None, what: str) -> str:
    if curve is None or not curve.not_numbers:
        return ""
    first = curve.first_not_number or 0
    return (
        f"{curve.not_numbers:,} logged {what} were no numbers, the first at step {first:,}; there the curve has gaps."
    )


def _best(record: Record, name: str) -> str:
    run = record.run
    if not run.best or not run.best_rule or run.best_rule[0] != name or name not in run.best:
        return ""
    return f"Best: {markup.figure(run.best[name])} at step {markup.figure(run.best.get('step'))}."


def _account(name: str) -> str:
    return name.replace("_", "-")


def _date(moment: Any) -> str | None:
    """2026-11-22 11:07 of an ISO 8601 time."""
    return moment[:16].replace("T", " ") if isinstance(moment, str) else None

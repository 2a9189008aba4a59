"""The top of a run's report: its state, and the few numbers that matter most."""

from __future__ import annotations

import numpy as np

from distloop.commands.reading import metrics_in
from distloop.commands.report.markup import number_html, text
from distloop.commands.report.read import Record
from distloop.commands.report.style import STATE_COLOURS
from distloop.run.accounts import goodput
from distloop.tracking.wording import UNKNOWN, long_duration, percent


def overview(record: Record) -> str:
    """The top of the page as HTML."""
    run, environment = record.run, record.environment.value or {}
    colour = STATE_COLOURS.get(run.state, "red")
    head = (
        f'<div class="top"><h1>{text(run.name)}</h1>'
        f'<span class="badge" style="--c:var(--{colour})">{text(run.state)}</span></div>'
    )
    commit = environment.get("git_commit")
    changed = environment.get("git_changes")
    facts = [
        _model_and_data(record),
        f"world size {environment['world_size']}" if environment.get("world_size") else "",
        _devices(record),
        f"attempt {run.attempt}" if (run.attempt or 0) > 1 else "",
        f"commit {str(commit)[:10]}{' with uncommitted changes' if changed else ''}" if commit else "",
    ]
    head += '<p class="facts">' + "".join(f"<span>{text(fact)}</span>" for fact in facts if fact) + "</p>"
    if run.reason and run.state not in ("finished", "running"):
        head += f'<p class="reason" style="--c:var(--{colour})">{text(run.reason.strip())}</p>'
    return head + '<div class="tiles">' + "".join(_tile(*tile) for tile in _tiles(record)) + "</div>"


def median_rate(record: Record) -> float | None:
    """The median of the run's samples per second."""
    curve = record.metrics.train.get("samples_per_second")
    means = curve.mean()[1] if curve else np.zeros(0)
    means = means[np.isfinite(means)]
    return float(np.median(means)) if len(means) else None


def _tile(value: str, label: str) -> str:
    return f'<div class="tile"><b>{value}</b><span>{text(label)}</span></div>'


def _tiles(record: Record) -> list[tuple[str, str]]:
    """(value as HTML, label) of each big number."""
    run, last = record.run, metrics_in(record.metrics.last_validation)
    step = max(run.step or 0, record.metrics.last_step) if run.state in ("running", "gone") else run.step
    tiles = [(number_html(step), f"step of {number_html(run.total_steps)}")]
    rule = run.best_rule
    if rule and run.best and rule[0] in run.best:
        tiles.append((number_html(run.best[rule[0]]), f"best {rule[0]}, step {number_html(run.best.get('step'))}"))
    names = [name for name in dict.fromkeys([rule[0] if rule else "", "loss", *last]) if name in last]
    for name in names[:2]:
        tiles.append((number_html(last[name]), "last validation loss" if name == "loss" else f"last {name}"))
    if not last:
        running_loss = record.metrics.last_train.get("running_loss")
        tiles.append((number_html(running_loss), "running training loss; no validation yet"))
    tiles.append((percent(goodput(record.seconds)), "goodput"))
    attempts = max(len(record.time.value or []), run.attempt or 0)
    wall = sum(record.seconds.values()) or None
    tiles.append((long_duration(wall), f"wall time, {attempts} attempt{'s' if attempts != 1 else ''}"))
    tiles.append((number_html(median_rate(record)), "samples per second"))
    return [tile for tile in tiles if tile[0] != UNKNOWN]


def _model_and_data(record: Record) -> str:
    """ "mlp on digits"; "" if the config does not name both."""
    config = record.config.value or {}

    def name(section: str) -> str:
        value = config.get(section)
        return str(value.get("name", "")) if isinstance(value, dict) else ""

    return f"{name('model')} on {name('data')}" if name("model") and name("data") else ""


def _devices(record: Record) -> str:
    return ", ".join(dict.fromkeys(str(a["device"]) for a in record.time.value or [] if a.get("device")))

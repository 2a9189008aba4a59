"""The section "Curves" of a run: losses, metrics, learning rate, gradient norm."""

from __future__ import annotations

import numpy as np

from distloop.commands.report.curves import Curve
from distloop.commands.report.markup import legend, number_html, quiet, text
from distloop.commands.report.plots import Trace, draw_curves
from distloop.commands.report.read import Record
from distloop.commands.report.rows import Floats


def curves(record: Record) -> str:
    """The section as HTML."""
    metrics, plots = record.metrics, []
    if metrics.problem:
        return quiet(metrics.problem)
    train, validation = metrics.train, metrics.validation
    loss = _step_loss(record)
    if "loss" in validation:
        loss.append((Trace(validation["loss"].all(), "red"), "validation"))
    plots.append(plot_of(record, "Loss", loss, _not_numbers(train.get("loss"), "training losses") + _skipped(record)))
    for name, curve in validation.items():
        if name != "loss" and np.isfinite(curve.all()[1]).any():
            plots.append(plot_of(record, f"Validation {name}", [(Trace(curve.all(), "red"), "")], _best(record, name)))
    if "lr" in train:
        plots.append(plot_of(record, "Learning rate", [(Trace(train["lr"].all(), "blue"), "")], logarithmic=False))
    if "gradient_norm" in train:
        note = _not_numbers(train["gradient_norm"], "gradient norms")
        plots.append(plot_of(record, "Gradient norm", with_mean(train["gradient_norm"], "blue"), note))
    notes = quiet("No validation yet.") if not validation else ""
    if metrics.damaged:
        notes += f'<p class="note">{metrics.damaged:,} lines of metrics.jsonl are no rows, and are left out.</p>'
    return f'<div class="plots">{"".join(plots)}</div>{notes}'


def plot_of(
    record: Record,
    title: str,
    traces: list[tuple[Trace, str]],
    note: str = "",
    logarithmic: bool | None = None,
    zero: bool = False,
) -> str:
    """A plot as HTML, with its title, a legend of its labelled curves and a note.

    `traces`: curves with their labels; "" for a curve without. See draw_curves for the other arguments.
    """
    usable = [(trace, label) for trace, label in traces if trace.points.shape[1]]
    if not usable:
        return f'<div><h3>{text(title)}</h3><p class="legend"></p>{quiet("Nothing is known of it.")}</div>'
    svg = draw_curves(
        [trace for trace, _ in usable], record.attempts, record.metrics.last_step, logarithmic=logarithmic, zero=zero
    )
    keys = legend((trace.colour, trace.style, label) for trace, label in usable if label)
    if all(not label for _, label in usable):
        keys, note = f'<p class="legend">{text(note)}</p>', ""
    if note:
        svg = f'<div>{svg}<p class="note">{text(note)}</p></div>'
    return f"<div><h3>{text(title)}</h3>{keys}{svg}</div>"


def with_mean(curve: Curve, colour: str) -> list[tuple[Trace, str]]:
    """A noisy curve in a light style, with a curve of its means over it. A curve of few points stays alone."""
    points, means = curve.all(), curve.mean()
    if points.shape[1] < 100:
        return [(Trace(points, colour), "")]
    finite = means[:, np.isfinite(means[1])]
    parts: list[Floats] = [part.mean(axis=1) for part in np.array_split(finite, 100, axis=1) if part.shape[1]]
    return [(Trace(points, colour, "thin"), "logged steps"), (Trace(np.array(parts).reshape(-1, 2).T, colour), "mean")]


def _step_loss(record: Record) -> list[tuple[Trace, str]]:
    """The curves of the training loss, with their labels."""
    metrics, traces = record.metrics, []
    if "loss" in metrics.train:
        traces.append((Trace(metrics.train["loss"].all(), "blue", "thin"), "training, single steps"))
    if metrics.epochs.points:
        epochs = metrics.epochs.all()
        traces.append((Trace(epochs, "blue"), "training, mean of each epoch"))
    if "running_loss" in metrics.train and metrics.epochs.all().shape[1] < 3:
        traces.append((Trace(metrics.train["running_loss"].mean(), "sky"), "training, running mean of the epoch"))
    return traces


def _not_numbers(curve: Curve | None, noun: str) -> str:
    """A sentence about the values of the curve that are nan or infinite; "" if there are none."""
    if curve is None or not curve.not_numbers:
        return ""
    first = curve.first_not_number or 0
    return (
        f"{curve.not_numbers:,} logged {noun} were no numbers, the first at step {first:,}; there the curve has gaps."
    )


def _skipped(record: Record) -> str:
    skipped = record.metrics.last_train.get("skipped_steps", 0.0)
    return f" {skipped:,.0f} steps were left out of training: their gradients were no numbers." if skipped > 0 else ""


def _best(record: Record, name: str) -> str:
    run = record.run
    if not run.best or not run.best_rule or run.best_rule[0] != name or name not in run.best:
        return ""
    return f"Best: {number_html(run.best[name])} at step {number_html(run.best.get('step'))}."

"""The section "Curves" of a run: losses, metrics, learning rate, gradient norm."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from distloop.commands.report.curves import Curve
from distloop.commands.report.plots import Trace, draw_curves
from distloop.commands.report.read import Record
from distloop.commands.report.sections import NothingToShowError
from distloop.tracking.wording import number_with_commas


class Plot(NamedTuple):
    """A plot in the page."""

    title: str
    svg: Markup | None = None
    """None if there is nothing to draw."""
    legend: Sequence[tuple[str, str, str]] = ()
    """(colour, style of the key: line | thin | area, label) of each curve that has a label."""
    note: str = ""


def curves(record: Record) -> dict[str, Any]:
    """The variables of plots.html."""
    metrics = record.metrics
    if metrics.problem:
        raise NothingToShowError(metrics.problem)
    train, validation = metrics.train, metrics.validation
    note, skipped = _not_numbers(train.get("loss"), "training losses"), metrics.last_train.get("skipped_steps", 0.0)
    if skipped > 0:
        note += f" {skipped:,.0f} steps were left out of training: their gradients were no numbers."
    plots = [plot_of(record, "Loss", _losses(record), note)]
    for name, curve in validation.items():
        if name != "loss" and np.isfinite(curve.all()[1]).any():
            plots.append(plot_of(record, f"Validation {name}", [Trace(curve.all(), "red")], _best(record, name)))
    if "lr" in train:
        plots.append(plot_of(record, "Learning rate", [Trace(train["lr"].all(), "blue")], logarithmic=False))
    if "gradient_norm" in train:
        note = _not_numbers(train["gradient_norm"], "gradient norms")
        plots.append(plot_of(record, "Gradient norm", with_mean(train["gradient_norm"]), note))
    for title, curve in metrics.own.items():
        if np.isfinite(curve.all()[1]).any():
            plots.append(plot_of(record, title, with_mean(curve), _not_numbers(curve, "values")))
    left_out = f"{len(metrics.own_left_out)} more values of the loop have no curve." if metrics.own_left_out else ""
    damaged = f"{metrics.damaged:,} lines of metrics.jsonl are no rows, and are left out." if metrics.damaged else ""
    notes = [("quiet", "" if validation else "No validation yet."), ("note", left_out), ("note", damaged)]
    return {"plots": plots, "notes": notes}


def plot_of(
    record: Record, title: str, traces: list[Trace], note: str = "", logarithmic: bool | None = None, zero: bool = False
) -> Plot:
    """A plot against the step, without the curves that have no points. For the arguments see draw_curves."""
    usable = [trace for trace in traces if trace.points.shape[1]]
    if not usable:
        return Plot(title)
    svg = draw_curves(usable, record.attempts, record.metrics.last_step, logarithmic, zero)
    return Plot(title, svg, [(trace.colour, trace.style, trace.label) for trace in usable if trace.label], note)


def with_mean(curve: Curve) -> list[Trace]:
    """A noisy curve in a light style, with a curve of its means over it. A curve of few points stays alone."""
    points, means = curve.all(), curve.mean()
    if points.shape[1] < 100:
        return [Trace(points, "blue")]
    finite = means[:, np.isfinite(means[1])]
    parts = [part.mean(axis=1) for part in np.array_split(finite, 100, axis=1) if part.shape[1]]
    smooth = np.array(parts, dtype=np.float64).reshape(-1, 2).T
    return [Trace(points, "blue", "thin", "logged steps"), Trace(smooth, "blue", label="mean")]


def _losses(record: Record) -> list[Trace]:
    metrics, traces, epochs = record.metrics, [], record.metrics.epochs.all()
    if "loss" in metrics.train:
        traces.append(Trace(metrics.train["loss"].all(), "blue", "thin", "training, single steps"))
    traces.append(Trace(epochs, "blue", label="training, mean of each epoch"))
    if "running_loss" in metrics.train and epochs.shape[1] < 3:
        means = metrics.train["running_loss"].mean()
        traces.append(Trace(means, "sky", label="training, running mean of the epoch"))
    if "loss" in metrics.validation:
        traces.append(Trace(metrics.validation["loss"].all(), "red", label="validation"))
    return traces


def _not_numbers(curve: Curve | None, noun: str) -> str:
    """A sentence about the values of the curve that are nan or infinite; "" if there are none."""
    if curve is None or not curve.not_numbers:
        return ""
    count, first = curve.not_numbers, curve.first_not_number or 0
    return f"{count:,} logged {noun} were no numbers, the first at step {first:,}; there the curve has gaps."


def _best(record: Record, name: str) -> str:
    run = record.run
    if not run.best or not run.best_rule or run.best_rule[0] != name or name not in run.best:
        return ""
    return f"Best: {number_with_commas(run.best[name])} at step {number_with_commas(run.best.get('step'))}."

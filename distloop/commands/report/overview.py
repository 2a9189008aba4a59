"""The top of a run's report: its state, and the few numbers that matter most."""

from typing import Any

import numpy as np

from distloop.commands.reading import metrics_in
from distloop.commands.report.read import Record


def overview(record: Record) -> dict[str, Any]:
    """The variables of top.html."""
    run, last = record.run, metrics_in(record.metrics.last_validation)
    metric = run.best_rule[0] if run.best_rule else ""
    return {
        "run": run,
        "trained": _model_and_data(record),
        "environment": record.environment.value or {},
        "devices": dict.fromkeys(str(each["device"]) for each in record.time.value or [] if each.get("device")),
        "step": max(run.step or 0, record.metrics.last_step) if run.state in ("running", "gone") else run.step,
        "metric": metric,
        "last": [(name, last[name]) for name in dict.fromkeys([metric, "loss", *last]) if name in last][:2],
        "running_loss": record.metrics.last_train.get("running_loss"),
        "seconds": record.seconds,
        "attempts": max(len(record.time.value or []), run.attempt or 0),
        "rate": median_rate(record),
    }


def median_rate(record: Record) -> float | None:
    """The median of the run's samples per second."""
    curve = record.metrics.train.get("samples_per_second")
    means = curve.mean()[1] if curve else np.zeros(0)
    means = means[np.isfinite(means)]
    return float(np.median(means)) if len(means) else None


def _model_and_data(record: Record) -> str:
    """ "mlp on digits"; "" if the config does not name both."""
    sections = [(record.config.value or {}).get(key) for key in ("model", "data")]
    names = [str(section.get("name", "")) for section in sections if isinstance(section, dict)]
    return " on ".join(names) if len(names) == 2 and all(names) else ""

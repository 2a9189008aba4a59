"""The top of a run's report: its state, and the few numbers that matter most."""

from __future__ import annotations

from typing import Any

import numpy as np

from distloop.commands.reading import metrics_in
from distloop.commands.report.read import Record


def overview(record: Record) -> dict[str, Any]:
    """The variables of top.html."""
    run, environment, last = record.run, record.environment.value or {}, metrics_in(record.metrics.last_validation)
    commit = environment.get("git_commit")
    facts = [
        _model_and_data(record),
        f"world size {environment['world_size']}" if environment.get("world_size") else "",
        ", ".join(dict.fromkeys(str(a["device"]) for a in record.time.value or [] if a.get("device"))),
        f"attempt {run.attempt}" if (run.attempt or 0) > 1 else "",
        f"commit {str(commit)[:10]}{' with uncommitted changes' * bool(environment.get('git_changes'))}" * bool(commit),
    ]
    metric = run.best_rule[0] if run.best_rule else ""
    return {
        "facts": filter(None, facts),
        "run": run,
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

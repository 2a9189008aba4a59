"""Which validation is the best one."""

from __future__ import annotations

import math
from typing import Any

from distloop.errors import UsageError
from distloop.run.best import is_better
from distloop.training.tasks import Task


def better(rule: tuple[str, str], best: dict[str, Any] | None, row: dict[str, Any]) -> dict[str, Any] | None:
    """The better of two validation rows by the task's (metric, min | max); the earlier one if they are equal."""
    metric = rule[0]
    if metric not in row:
        known = ", ".join(name for name in row if name not in ("step", "samples"))
        raise UsageError(f"checkpoint.best: validation gives no {metric!r}, but {known}.")
    if not math.isfinite(row[metric]):
        return best
    return row if best is None or is_better(rule, row[metric], best[metric]) else best


def best_rule(named: str | None, task: Task) -> tuple[str, str]:
    """(metric, min | max) of the best checkpoint, from checkpoint.best such as "max accuracy", or the task's own."""
    if named is None:
        return task.best
    direction, metric = named.split()
    return metric, direction

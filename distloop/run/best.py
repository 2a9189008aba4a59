"""Which validation is the best one: by one metric, in one direction. Nothing here imports torch."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from distloop.errors import UsageError

Rule = tuple[str, str]
"""(metric, min | max)"""


def is_better(direction: str, new: Any, old: Any) -> bool:
    """Whether the metric `new` is better than `old`; nothing that is no finite number is, and equal is not."""
    if not isinstance(new, Real) or not math.isfinite(new):
        return False
    if not isinstance(old, Real):
        return True
    return new > old if direction == "max" else new < old


class Best:
    """The best validation row of a run so far."""

    def __init__(self, named: str | None, default: Rule) -> None:
        """`named`: checkpoint.best, such as "max accuracy"; None: `default`, the task's own rule."""
        self.rule: Rule = default
        if named is not None:
            direction, metric = named.split()
            self.rule = (metric, direction)
        self.row: dict[str, Any] | None = None

    @property
    def step(self) -> int | None:
        """The step after which it was the best."""
        return self.row["step"] if self.row else None

    def update(self, step: int, metrics: dict[str, Any]) -> None:
        """Take up the validation after `step`. Raises UsageError when it has no such metric."""
        metric, direction = self.rule
        if metric not in metrics:
            known = ", ".join(name for name in metrics if name != "samples")
            raise UsageError(f"checkpoint.best: validation gives no {metric!r}, but {known}.")
        if is_better(direction, metrics[metric], (self.row or {}).get(metric)):
            self.row = {"step": step, **metrics}

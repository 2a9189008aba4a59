"""Which validation is the best one: by one metric, in one direction. Nothing here imports torch."""

import math
from numbers import Real
from typing import Any

from distloop.errors import UsageError
from distloop.run.metrics import is_metric

Rule = tuple[str, str]  # (name of a metric, min | max)


def is_better(rule: Rule, new: Any, old: Any) -> bool:
    """True if `new` is a better value of the rule's metric than `old`. Any number is better than None, nan, infinity
    and values that are no numbers, which are never better. Of two equal values the old one stays the best."""
    if not _is_number(new):
        return False
    if not _is_number(old):
        return True
    return new > old if rule[1] == "max" else new < old


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


class Best:
    """The best validation row of a run so far."""

    def __init__(self, named: str | None, default: Rule) -> None:
        """`named`: checkpoint.best, such as "max accuracy"; None: `default`, the task's own rule."""
        self.rule: Rule = default
        self.is_named = named is not None
        if named is not None:
            direction, metric = named.split()
            self.rule = (metric, direction)
        self.row: dict[str, Any] | None = None

    @property
    def step(self) -> int | None:
        """The step after which it was the best."""
        return self.row["step"] if self.row else None

    def check(self, metrics: dict[str, Any], samples: int = 0) -> None:
        """Raise UsageError when a validation has no such metric. `samples`: how many a whole one has, if these metrics
        may be of fewer."""
        metric, _ = self.rule
        if metric not in metrics:
            known = [name for name in metrics if is_metric(name)]
            where = "checkpoint.best" if self.is_named else f"the task's best = {self.rule!r}"
            message = (
                f"{where}: validation gives no {metric!r}, but {', '.join(known)}. Let summary() return it (what "
                "metrics() gives is handed to summary(), and not shown by itself), or name one of these."
            )
            if (some := metrics.get("samples", samples)) < samples:
                message += (
                    f" These are the metrics of {some} of {samples} samples, before training: if summary() leaves "
                    f'{metric} out for so few, let it give float("nan") there, which is never the best.'
                )
            raise UsageError(message)

    def update(self, step: int, metrics: dict[str, Any]) -> None:
        """Take up the validation after `step`; that before the first step, which no checkpoint has, is never the best.
        Raises UsageError when it has no such metric."""
        self.check(metrics)
        metric, _ = self.rule
        if step and is_better(self.rule, metrics[metric], (self.row or {}).get(metric)):
            self.row = {"step": step, **metrics}

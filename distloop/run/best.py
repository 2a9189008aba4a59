"""Which of two values of a metric is better. Nothing here imports torch."""

from __future__ import annotations

import math
from typing import Any

Rule = tuple[str, str]  # (name of a metric, min | max)


def is_better(rule: Rule, new: Any, old: Any) -> bool:
    """Whether `new` is better than `old`, two values of the rule's metric.

    Any number is better than None, nan, infinity and what is not a number; these are never better. Of two equal
    values the old one stays the best.
    """
    if not _is_number(new):
        return False
    if not _is_number(old):
        return True
    return new > old if rule[1] == "max" else new < old


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)

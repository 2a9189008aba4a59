"""What is known of a run while it trains, for all that shows it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from distloop.run.best import is_better
from distloop.run.metrics import NO_METRICS
from distloop.tracking.wording import number


def metrics_of(row: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a row of validation, or the mean loss of one of an epoch; None (nan in a file) is nan."""
    return {name: math.nan if value is None else value for name, value in row.items() if name not in NO_METRICS}


def number_in(row: dict[str, Any], key: str, form: str = "") -> str | None:
    """The row's number as people read it, or as `form` says; None: the row has none. A None in it is nan."""
    if key not in row:
        return None
    value = math.nan if row[key] is None else row[key]
    return f"{value:{form}}" if form else number(value)


@dataclass
class Known:
    """All that is known of the run and may be shown of it."""

    name: str
    attempt: int
    first_step: int
    total_steps: int
    steps_per_epoch: int
    best_rule: tuple[str, str]  # (metric, min | max)
    best: dict[str, Any] | None  # rows of validation
    saved: Callable[[], int | None]
    latest: dict[str, Any] | None = None
    train: dict[str, Any] = field(default_factory=dict)  # the latest row
    url: str = ""
    # (step, time) of the first train row, before which workers start and things are compiled, and of the latest row.
    since: tuple[int, float] | None = None
    until: tuple[int, float] = (0, 0.0)

    @property
    def step(self) -> int:
        return max(self.first_step, self.until[0])

    @property
    def epochs(self) -> int:
        return -(-self.total_steps // self.steps_per_epoch)

    def add(self, row: dict[str, Any]) -> None:
        """Take up a row of any kind."""
        self.until = now = (int(row["step"]), time.monotonic())
        if row["kind"] == "train":
            self.train = row
            self.since = self.since or now
        elif row["kind"] == "validate":
            metric = self.best_rule[0]
            self.latest = row
            if is_better(self.best_rule, row.get(metric), (self.best or {}).get(metric)):
                self.best = row

    def seconds_left(self) -> float | None:
        """From the steps since the first row of this attempt, and from the validations and saves between them."""
        if self.since is None or self.until[0] <= self.since[0]:
            return None
        a_step = (self.until[1] - self.since[1]) / (self.until[0] - self.since[0])
        since_then = time.monotonic() - self.until[1]
        return max(0.0, a_step * (self.total_steps - self.until[0]) - since_then)

    def data_wait(self) -> str | None:
        """The share of the latest row's training time in which this rank waited for data."""
        data, compute = self.train.get("data_seconds"), self.train.get("compute_seconds")
        return None if data is None or not compute else f"{100 * data / (data + compute):.0f} %"

    def memory(self) -> float | None:
        """GiB, of the rank that has used most."""
        return max((value for value in self.train.get("memory_gib") or [] if value is not None), default=None)

"""The progress of a run while it trains: what the console and the live view show."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from distloop.run.best import Rule, is_better
from distloop.run.metrics import is_metric
from distloop.tracking.wording import number


def metrics_of(row: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a validation row, or the mean loss of an epoch row; nan in the place of None."""
    return {name: math.nan if value is None else value for name, value in row.items() if is_metric(name)}


def number_in(row: dict[str, Any], key: str, form: str = "") -> str | None:
    """The number under `key` as text, formatted as `form` if given; None if the row lacks the key, nan for a None."""
    if key not in row:
        return None
    value = math.nan if row[key] is None else row[key]
    return f"{value:{form}}" if form and isinstance(value, (int, float)) else number(value)


@dataclass
class Progress:
    """How far the run is. The caller calls add() with each new row."""

    name: str
    attempt: int
    first_step: int
    """How many steps were done when the attempt began."""
    total_steps: int
    steps_per_epoch: int
    best_rule: Rule
    best: dict[str, Any] | None
    """The best validation row of all attempts."""
    saved_step: Callable[[], int | None]
    """Returns the step of the newest checkpoint, or None."""
    latest: dict[str, Any] | None = None
    """The latest validation row of this attempt."""
    train: dict[str, Any] = field(default_factory=dict)
    """The latest row of kind train."""
    url: str = ""
    """Where else the run can be seen."""
    first_train: tuple[int, float] | None = None
    """(step, time) of the attempt's first train row. Workers start and models compile before it."""
    last_row: tuple[int, float] = (0, 0.0)
    """(step, time) of the latest row of any kind."""

    @property
    def step(self) -> int:
        return max(self.first_step, self.last_row[0])

    @property
    def epochs(self) -> int:
        return -(-self.total_steps // self.steps_per_epoch)

    def add(self, row: dict[str, Any]) -> None:
        """Take a new row of metrics into account, of any kind."""
        self.last_row = (int(row["step"]), time.monotonic())
        if row["kind"] == "train":
            self.train = row
            self.first_train = self.first_train or self.last_row
        elif row["kind"] == "validate":
            metric = self.best_rule[0]
            self.latest = row
            if row["step"] and is_better(self.best_rule, row.get(metric), (self.best or {}).get(metric)):
                self.best = row

    def seconds_left(self) -> float | None:
        """An estimate: the steps left at the mean pace since the first train row, validations and saves included."""
        if self.first_train is None or self.last_row[0] <= self.first_train[0]:
            return None
        (first_step, first_time), (last_step, last_time) = self.first_train, self.last_row
        seconds_per_step = (last_time - first_time) / (last_step - first_step)
        return max(0.0, last_time + seconds_per_step * (self.total_steps - last_step) - time.monotonic())

    def data_wait(self) -> str | None:
        """The share of the training time that rank 0 waited for data, in the latest train row, such as "2 %"."""
        data, compute = self.train.get("data_seconds"), self.train.get("compute_seconds")
        return None if data is None or not compute else f"{100 * data / (data + compute):.0f} %"

    def memory(self) -> float | None:
        """The memory in GiB of the rank that uses most."""
        by_rank = self.train.get("memory_gib")
        values = by_rank if isinstance(by_rank, list) else [by_rank]
        return max((value for value in values if value is not None), default=None)

"""The console of rank 0: a live view on a terminal (live_view.py), plain lines in a file."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from distloop.cluster import say
from distloop.runs import NO_METRICS

if TYPE_CHECKING:
    from distloop.tracking.live_view import LiveView

ASCII = {"·": "-", "×": "x", "…": "...", "–": "-", "—": "-", "→": "->", "━": "=", "─": "-", "≤": "<=", "≥": ">="}


def number(value: Any) -> str:
    """A number as people read it: 0.9806, 1.2e-05, 12345; anything else (a list of a user's task) as it is."""
    if not isinstance(value, (int, float)):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """65 -> 1:05, 3700 -> 1:01:40."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def sayable(text: str, encoding: str | None) -> str:
    """The text with what `encoding` cannot say replaced: · by -, … by ..., a letter by a question mark."""
    try:
        text.encode(encoding or "utf-8")
        return text
    except UnicodeEncodeError:
        return "".join(_sayable(character, encoding or "utf-8") for character in text)


def _sayable(character: str, encoding: str) -> str:
    try:
        character.encode(encoding)
        return character
    except UnicodeEncodeError:
        return ASCII.get(character, "?")


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
            metric, direction = self.best_rule
            self.latest = row
            new, old = ((r or {}).get(metric) for r in (row, self.best))
            if isinstance(new, (int, float)) and math.isfinite(new):
                better = old is None or (new > old if direction == "max" else new < old)
                self.best = row if better else self.best

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


class Console:
    """Shows lines and rows of metrics. Use it from rank 0 only.

    saved: the step of the newest checkpoint, or None. On a terminal, what is known stands in a live view from the
    first line on until close(), above which the lines scroll.
    """

    def __init__(
        self,
        name: str,
        attempt: int,
        first_step: int,
        total_steps: int,
        steps_per_epoch: int,
        best_rule: tuple[str, str],
        best: dict[str, Any] | None,
        saved: Callable[[], int | None],
    ) -> None:
        self.known = Known(name, attempt, first_step, total_steps, steps_per_epoch, best_rule, best, saved)
        self.view: LiveView | None = None
        self.plain = not sys.stdout.isatty() or os.environ.get("TERM", "") in ("", "dumb", "unknown")

    def line(self, text: str) -> None:
        """One line that stays."""
        say(sayable(text, sys.stdout.encoding))
        self._open()

    def log(self, row: dict[str, Any]) -> None:
        """Show one row of metrics, of kind train, epoch or validate."""
        self.known.add(row)
        if row["kind"] != "train":
            what = "trained" if row["kind"] == "epoch" else "validated"
            values = [f"{name} {number(value)}" for name, value in metrics_of(row).items()]
            self.line(" · ".join([f"epoch {row['epoch']}/{self.known.epochs}", what, f"step {row['step']}", *values]))
        elif self.plain:
            self.line(" · ".join(self._training(row)))
        else:
            self._open()

    def link(self, url: str) -> None:
        """Where else the run can be seen."""
        self.known.url = url

    def close(self) -> None:
        """Take the live view away; lines may follow."""
        view, self.view, self.plain = self.view, None, True
        if view:
            view.close()

    def _open(self) -> None:
        if not (self.view or self.plain):
            from distloop.tracking.live_view import LiveView

            self.view = LiveView(self.known)

    def _training(self, row: dict[str, Any]) -> list[str]:
        known, left = self.known, self.known.seconds_left()
        loss, lr, rate = (
            number_in(row, "running_loss"),
            number_in(row, "lr", ".3g"),
            number_in(row, "samples_per_second"),
        )
        wait = known.data_wait()
        return [
            f"epoch {row['epoch']}/{known.epochs}",
            f"step {row['step']}/{known.total_steps}",
            *([f"running loss {loss}"] if loss else []),
            *([f"lr {lr}"] if lr else []),
            *([f"{rate} samples/s"] if rate else []),
            *([f"data wait {wait}"] if wait else []),
            *([f"{duration(left)} left"] if left is not None else []),
        ]

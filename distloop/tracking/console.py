"""The console of rank 0: a live view on a terminal (live_view.py), plain lines in a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from distloop.ranks.talking import say
from distloop.tracking.progress import Known, metrics_of, number_in
from distloop.tracking.wording import duration, encodable, number

if TYPE_CHECKING:
    from distloop.tracking.live_view import LiveView


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
        say(encodable(text, sys.stdout.encoding))
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

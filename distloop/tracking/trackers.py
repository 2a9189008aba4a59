"""All that is told of a run, behind one small interface: log a row, say a line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distloop.run_directory import Start
from distloop.run_files import METRICS
from distloop.tracking.console import Console
from distloop.tracking.metrics_file import MetricsFile


class Trackers:
    """All trackers of rank 0; on the other ranks it does nothing. Use as a context around the loop."""

    def __init__(
        self,
        start: Start,
        total_steps: int,
        steps_per_epoch: int,
        enabled: bool,
        owned: Callable[[], None] = lambda: None,
    ) -> None:
        self.owned = owned
        self.attempt = start.attempt
        self.console = Console(start.step, total_steps, -(-total_steps // steps_per_epoch)) if enabled else None
        self.trackers: list[MetricsFile | Console] = []
        if self.console:
            self.trackers = [MetricsFile(start.path / METRICS), self.console]

    def log(self, kind: str, step: int, epoch: int, **values: Any) -> None:
        """One row: `kind` is train, epoch or validate; `step` steps are done; `epoch` counts from 0."""
        row = {"kind": kind, "step": step, "epoch": epoch + 1, "attempt": self.attempt, **values}
        self.owned()
        for tracker in self.trackers:
            tracker.log(row)

    def say(self, *lines: str) -> None:
        """Lines for people."""
        if self.console:
            for line in lines:
                self.console.line(line)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *error: object) -> None:
        for tracker in self.trackers:
            tracker.close()

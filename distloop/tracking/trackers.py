"""All that is told of a run, behind one small interface: log a row, say a line, finish."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable
from typing import Any

from distloop.config.settings import Tracking
from distloop.run.files import METRICS, Start
from distloop.run.metrics import MetricsFile
from distloop.tracking.console import Console
from distloop.tracking.wandb.process import WandbProcess, own_python, wandb_mode

REPORT_SECONDS = 60.0
STOPPED_SECONDS = 15.0  # for W&B when the run is stopped: those who stopped it may not wait long, and it continues
FAILED_SECONDS = 8.0  # less than ranks wait for each other after a failure


class Trackers:
    """All trackers of rank 0; on the other ranks it does nothing. Use as a context around the loop.

    W&B starts at once, in a process of its own, beside what else has to be prepared; it reads metrics.jsonl.
    """

    def __init__(
        self, start: Start, settings: Tracking, enabled: bool, owned: Callable[[], None], waiting: Callable[[], Any]
    ) -> None:
        """`waiting` is called several times a second while rank 0 waits for W&B or the report; at the start, a true
        answer ends the waiting."""
        self.waiting = waiting
        self.path, self.attempt, self.settings, self.owned = start.path, start.attempt, settings, owned
        mode = wandb_mode(settings, os.environ) if enabled else None
        self.wandb = WandbProcess(start.path, settings, mode) if mode else None
        self.file: MetricsFile | None = None
        self.console: Console | None = None

    def begin(self, console: Console | None) -> list[str]:
        """The loop is about to begin. On rank 0, with its console: waits for W&B, and returns what to say of it."""
        self.console = console
        if console is None:
            return []
        self.file = MetricsFile(self.path / METRICS)
        if self.wandb is None:
            return []
        line = self.wandb.started(self.waiting)
        if self.wandb.url:
            console.link(self.wandb.url)
        return [line]

    def log(self, kind: str, step: int, epoch: int, **values: Any) -> None:
        """One row: `kind` is train, epoch or validate; `step` steps are done; `epoch` counts from 0."""
        if self.file is None or self.console is None:
            return
        row = {"kind": kind, "step": step, "epoch": epoch + 1, "attempt": self.attempt, "time": round(time.time(), 3)}
        row |= values | row  # whatever a task calls its metrics
        self.owned()
        self.file.log(row)
        self.console.log(row)

    def say(self, *lines: str) -> None:
        """Lines for people."""
        if self.console:
            for line in lines:
                self.console.line(line)

    def finish(self, state: str, *lines: str) -> None:
        """On rank 0: the run is saved and finished, or stopped; say so, and bring report and W&B to an end."""
        if self.console is None:
            return
        self._close()
        self.say(*lines)
        report = None
        if state == "finished" and self.settings.report:
            command, environment = own_python("distloop.commands.report", str(self.path))
            report = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if self.wandb is not None:
            seconds = self.settings.end_seconds
            self._end_wandb(state, seconds if state == "finished" else min(seconds, STOPPED_SECONDS))
        if report is not None:
            self._wait_for_report(report)

    def _wait_for_report(self, report: subprocess.Popen[bytes]) -> None:
        """A process of its own: whatever a library for drawing does, the run has ended well."""
        until = time.monotonic() + REPORT_SECONDS
        said = None
        while said is None and time.monotonic() < until:
            self.waiting()
            with contextlib.suppress(subprocess.TimeoutExpired):
                said = report.communicate(timeout=0.2)[0].decode(errors="replace").strip()
        if said is not None and report.returncode == 0:
            self.say(f"  report: {self.path / 'report.html'}")
            return
        report.kill()
        problem = (
            f"not ready after {REPORT_SECONDS:g} s" if said is None else (said or "no reason given").splitlines()[-1]
        )
        self.say(
            f"distloop: WARNING: the report was not written ({problem}); `distloop report {self.path}` tries again"
        )

    def _end_wandb(self, state: str, seconds: float) -> None:
        if self.wandb is not None:
            problem = self.wandb.finish(state, seconds, self.waiting)
            self.wandb = None
            if problem:
                self.say(problem)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._close()
        if kind is not None:
            interrupted = issubclass(kind, KeyboardInterrupt)  # Ctrl-C again: end at once
            self._end_wandb("stopped" if interrupted else "failed", 0.0 if interrupted else FAILED_SECONDS)

    def _close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None
        if self.console is not None:
            self.console.close()

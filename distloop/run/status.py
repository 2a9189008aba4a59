"""status.json: how a run is doing, or how it ended."""

import contextlib
import os
from collections.abc import Callable
from typing import Any

from distloop.ranks.talking import say
from distloop.run.files import STATUS, Start, now, read_json, write_json


class RunStatus:
    """Keeps status.json. Rank 0 writes it when the attempt begins, after each checkpoint, and at the end."""

    def __init__(
        self,
        enabled: bool,
        total_steps: int,
        best_rule: tuple[str, str] | None = None,
        check_ownership: Callable[[], None] = lambda: None,
    ) -> None:
        self.enabled, self.total_steps, self.best_rule = enabled, total_steps, best_rule
        self.check_ownership = check_ownership
        self.start: Start | None = None  # None: the attempt has not begun
        self.step = 0
        self.best: dict[str, Any] | None = None
        self.closed = False

    def begin(self, start: Start, best: dict[str, Any] | None) -> None:
        """Write that the attempt begins. `best`: the best validation row of the attempts before."""
        self.start = start
        self.update(start.step, best)

    def update(self, step: int, best: dict[str, Any] | None) -> None:
        """Write that the run is saved at `step`. `best`: the best validation row so far."""
        self.step, self.best = step, best
        if not self.closed:  # a save may end after end()
            self._write("running", None)

    def end(self, state: str, reason: str) -> None:
        """Write how the attempt ended. `state`: finished | stopped | failed. Later calls change nothing."""
        if not self.closed:
            self.closed = True
            self._write(state, reason)

    def cut_off(self, state: str, reason: str) -> None:
        """Write how the attempt ended, from a thread that ends the process. `state`: stopped | failed."""
        if not self.closed:
            self._write(state, f"{reason}, without saving" if state == "stopped" else reason)

    def rank_0_is_lost(self, reason: str) -> None:
        """On another rank: write that the attempt has failed, since rank 0 is gone."""
        if self.start is None:
            return
        status = read_json(self.start.path / STATUS)
        if status.get("attempt") == self.start.attempt and status.get("state") == "running":  # no later attempt's
            with contextlib.suppress(OSError):
                write_json(self.start.path / STATUS, {**status, "state": "failed", "reason": reason, "written": now()})

    def _write(self, state: str, reason: str | None) -> None:
        if not self.enabled or self.start is None:
            return
        self.check_ownership()
        status: dict[str, Any] = {"state": state, "step": self.step, "total_steps": self.total_steps}
        status |= {"best": self.best, "best_rule": self.best_rule}
        status |= {"attempt": self.start.attempt, "first_step": self.start.step, "reason": reason}
        status["slurm_job"] = os.environ.get("SLURM_JOB_ID")
        status["slurm_restart"] = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        status["written"] = now()
        try:
            write_json(self.start.path / STATUS, status)
        except OSError as error:  # a full disk does not end training
            say(f"distloop: WARNING: {STATUS} cannot be written ({error.strerror}): {state}")

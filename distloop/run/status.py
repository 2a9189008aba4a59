"""status.json: how a run is doing, or how it ended."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from distloop.ranks.talking import say
from distloop.ranks.verdicts import Verdict
from distloop.run.files import STATUS, read_json, write_text

if TYPE_CHECKING:
    from distloop.run.files import Start


class RunStatus:
    """Keeps status.json: written by rank 0 when the run starts, has saved and ends, however it ends."""

    def __init__(
        self,
        enabled: bool,
        total_steps: int,
        judge: Callable[[BaseException], Verdict] | None = None,
        owned: Callable[[], None] = lambda: None,
    ) -> None:
        self.enabled, self.total_steps = enabled, total_steps
        self.judge, self.owned = judge, owned
        self.start: Start | None = None  # nothing is written before
        self.step = 0
        self.best: dict[str, Any] | None = None
        self.best_rule: tuple[str, str] | None = None
        self.stopped_by: str | None = None
        self.closed = False

    def __enter__(self) -> RunStatus:
        return self

    def begin(self, start: Start, best: dict[str, Any] | None) -> None:
        """The attempt begins; `best` is that of the attempts before."""
        self.start = start
        self.update(start.step, best)

    def update(self, step: int, best: dict[str, Any] | None) -> None:
        """The run has been saved at `step`; `best`: the best validation row so far."""
        self.step, self.best = step, best
        if not self.closed:  # a save goes on when Ctrl-C has ended the rest
            self._write("running", None)

    def cut_off(self, state: str, reason: str) -> None:
        """The process ends at once, without its main thread."""
        if not self.closed:
            self._write(state, f"{reason}, without saving" if state == "stopped" else reason)

    def rank_0_is_lost(self, reason: str) -> None:
        """On another rank: say for rank 0, which cannot, that the attempt has failed."""
        if self.start is None:
            return
        status = read_json(self.start.path / STATUS)
        if status.get("attempt") == self.start.attempt and status.get("state") == "running":  # still our run
            status |= {"state": "failed", "reason": reason, "written": _now()}
            with contextlib.suppress(OSError):
                write_text(self.start.path / STATUS, json.dumps(status, indent=1) + "\n")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self.closed:
            return
        if error is not None and self.judge is not None:
            verdict = self.judge(error)  # of all ranks: this one's error may be a consequence
            self.closed = True
            self._write("stopped" if isinstance(error, KeyboardInterrupt) else "failed", verdict.reason)
            return
        self.end()

    def end(self) -> None:
        """The attempt has ended in order: finished, or stopped. What follows changes nothing of it."""
        self.closed = True
        if self.stopped_by:
            self._write("stopped", self.stopped_by)
        else:
            self._write("finished", "all steps are done")

    def _write(self, state: str, reason: str | None) -> None:
        if not self.enabled or self.start is None:
            return
        self.owned()
        status = {
            "state": state,
            "step": self.step,
            "total_steps": self.total_steps,
            "best": self.best,
            "best_rule": self.best_rule,
            "attempt": self.start.attempt,
            "first_step": self.start.step,  # of this attempt
            "reason": reason,
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "slurm_restart": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
            "written": _now(),
        }
        try:
            write_text(self.start.path / STATUS, json.dumps(status, indent=1) + "\n")
        except OSError as error:  # the disk is full: no reason to end
            say(f"distloop: WARNING: {STATUS} cannot be written ({error.strerror}): {state}")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

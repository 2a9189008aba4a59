"""The W&B run of a run directory: row n of metrics.jsonl is row n of the W&B run, whichever attempt wrote it.

Each start asks the server how many rows it has, takes back those whose steps are done again, and uploads those that
are missing. wandb.json in the run directory keeps the W&B run's id.
"""

import contextlib
import io
import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distloop.config.references import read_environment
from distloop.run.files import METRICS, WANDB, read_json, write_text
from distloop.run.metrics import count_rows
from distloop.run.set_aside import lines_from_end, set_aside_until
from distloop.tracking.wandb import session
from distloop.tracking.wandb.rows import RowReader, as_logged, parse_row
from distloop.tracking.wandb.session import WandbError, one_line

OFFLINE_SECONDS = 3.0  # of the start's time, kept for beginning a run offline
MOST_RESTARTS = 5  # of wandb's own process


class WandbRun:
    """The W&B run of one run directory, in this process.

    The caller redirects standard error, to which wandb prints, into `output`. `state` is what wandb.json holds:

    - id, url, project, entity: of the W&B run.
    - rows: how many rows W&B has been given.
    - uploaded, attempt: how many of them while it was online, and the attempt that wrote the last of these.
    - surplus: how many more rows the server has, of steps that were done again, because it could not take them back.
    """

    def __init__(self, run: Path, settings: dict[str, Any], mode: str) -> None:
        """`settings`: the section `tracking` of config.yaml. `mode`: online | offline. Raises UsageError for a setting
        env:NAME without such a variable."""
        self.path, self.settings, self.mode = run, read_environment(settings, "tracking"), mode
        self.output = io.StringIO()
        self.state = _read_state(run)
        self._write_state()
        self.online, self.restarts = False, 0
        self.offline_reason: str | None = None  # why it is offline after a restart, although it was online before
        self.wandb: Any = None
        self.run: Any = None
        self.reader: RowReader | None = None
        self.next_row = 0  # of metrics.jsonl, to give to W&B
        self.start_of_batch = 0  # the first of the rows that W&B was given last
        self.redone_until = -1  # W&B has the rows up to this step twice, since it could not take back the first ones

    def start(self, seconds: float, or_offline: bool = True) -> str | None:
        """Begin or continue the W&B run within so many seconds. Returns why it is offline instead of online, or None.

        Raises WandbError if nothing can be logged; without `or_offline` also if W&B cannot be reached.
        """
        deadline = time.monotonic() + seconds
        self.wandb = session.import_wandb()
        rows_of_file = count_rows(self.path / METRICS)
        problem = None
        if self.mode == "online":
            try:
                self._start_online(deadline - OFFLINE_SECONDS)
                self.online = True
            except Exception as error:  # of many types
                problem = one_line(error)
                self.run = None
                session.tear_down(self.wandb)
                if not or_offline:
                    raise WandbError(problem) from None
        if self.run is None:
            try:
                self._begin("offline", OFFLINE_SECONDS + 30, id=self.state["id"], resume="allow")
            except Exception as error:
                raise WandbError(one_line(error)) from None
            self.next_row = min(rows_of_file, self.state["rows"])
            if self.state["rows"] > rows_of_file:
                self.redone_until = set_aside_until(self.path / METRICS)
        self.state["rows"] = min(rows_of_file, self.state["rows"])
        session.describe(self.run, self.path)
        if self.run.url:
            self.state |= {"url": self.run.url, "project": self.run.project, "entity": self.run.entity}
        self._write_state()
        return problem

    def _start_online(self, deadline: float) -> None:
        """Continue on the server. It first takes back the rows whose steps are done again, if it can."""
        self._begin("online", deadline - time.monotonic(), id=self.state["id"], resume="allow")
        right = self._rows_still_right()
        # W&B must keep one row. If nothing was saved, it is that of the first step, which comes out the same again.
        allowed = max(right + self.state["surplus"], 1)
        if self.run.starting_step > allowed and not self.state["surplus"]:
            self.run.finish(exit_code=1)
            try:
                last_row = f"{self.state['id']}?_step={allowed - 1}"
                self._begin("online", deadline - time.monotonic(), resume_from=last_row)
            except self.wandb.errors.CommError:  # this server cannot take rows back
                session.tear_down(self.wandb)
                self._begin("online", deadline - time.monotonic(), id=self.state["id"], resume="allow")
        rows_of_server = self.run.starting_step
        if rows_of_server > allowed:
            self.state["surplus"] = rows_of_server - right
        elif rows_of_server < self.state["surplus"]:  # the run was deleted there, or this is another server
            self.state["surplus"] = 0
        if self.state["surplus"]:
            self.redone_until = set_aside_until(self.path / METRICS)
        self.next_row = self.state["uploaded"] = rows_of_server - self.state["surplus"]

    def _begin(self, mode: str, seconds: float, **resume: Any) -> None:
        self.run = session.begin(self.wandb, self.path, self.settings, mode, seconds, **resume)

    def _rows_still_right(self) -> int:
        """How many of the uploaded rows are still in the file: no later attempt has done their steps again. Rows are in
        the order of attempts, and looked at from the end."""
        right = count_rows(self.path / METRICS)
        with contextlib.suppress(FileNotFoundError), open(self.path / METRICS, "rb") as file:
            for _, line in lines_from_end(file):
                row = parse_row(line)
                if row and int(row.get("attempt") or 0) <= self.state["attempt"]:  # a damaged line says nothing
                    break
                right -= line.endswith(b"\n")  # as count_rows() counts
        return min(right, self.state["uploaded"])

    def log_new_rows(self) -> None:
        """Log the rows that were written since the last call."""
        self._log_new_rows_and(lambda: None)

    def finish(self, state: str) -> str | None:
        """Log the last rows and end the W&B run (finished | stopped | failed). Returns why data is missing, or None."""
        limit = self.settings["end_seconds"]
        problem = self._log_new_rows_and(lambda: session.end(self.run, self.path, state, limit, self.output))
        return problem or self.offline_reason

    def _log_new_rows_and(self, function: Callable[[], str | None]) -> str | None:
        """Log new rows, then return what `function` returns. If wandb's own process dies, start again and repeat.

        It dies when a scheduler stops a job and sends the signal to all of its processes.
        """
        while True:
            try:
                if self.run is None:
                    self.offline_reason = self.start(self.settings["start_seconds"])
                self._log_new_rows()
                return function()
            except WandbError:
                raise
            except Exception:  # of several types
                self.restarts += 1
                if self.restarts > MOST_RESTARTS:
                    raise
                session.tear_down(self.wandb)
                self.run = self.reader = None
                self.online = False
                self.state["rows"] = self.start_of_batch  # wandb may have lost the last batch

    def _log_new_rows(self) -> None:
        if self.reader is None:
            with contextlib.suppress(FileNotFoundError):
                self.reader = RowReader(self.path / METRICS, self.next_row)
        while self.reader and (rows := self.reader.read()):
            self.start_of_batch = self.next_row
            self.next_row += len(rows)
            self.state["rows"] = self.next_row  # before they are logged: they may arrive even if this process dies
            if self.online:
                self.state |= {"uploaded": self.next_row, "attempt": rows[-1].get("attempt") or 0}
            self._write_state()
            for row in rows:
                self.run.log(as_logged(row, self.path, self.redone_until))

    def _write_state(self) -> None:
        with contextlib.suppress(OSError):  # a full disk must not end the upload
            write_text(self.path / WANDB, json.dumps(self.state, indent=1) + "\n")


def _read_state(run: Path) -> dict[str, Any]:
    """What wandb.json holds; a new id if it is damaged or missing, and 0 for each number that is."""
    state = read_json(run / WANDB)
    if not isinstance(state, dict) or not isinstance(state.get("id"), str):
        state = {"id": secrets.token_hex(4)}
    numbers = ("rows", "uploaded", "attempt", "surplus")
    return state | {name: state[name] if isinstance(state.get(name), int) else 0 for name in numbers}

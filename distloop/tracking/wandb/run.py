"""The W&B run of a run directory: row n of metrics.jsonl is row n of the W&B run, whichever attempt wrote it.

A start looks how many rows the server has, takes back those that are done again and gives it those that it missed.
wandb.json in the run directory keeps the W&B run's id.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from distloop.config.yaml_text import parse_yaml
from distloop.run.accounts import goodput, totals
from distloop.run.files import CONFIG, ENVIRONMENT, GIT_DIFF, METRICS, STATUS, WANDB, read_json, write_text
from distloop.run.metrics import count_rows, set_aside_until
from distloop.tracking.wandb.rows import as_logged, parse_row

OFFLINE_SECONDS = 3.0  # to begin a run offline, out of the time for the start
ROWS_AT_ONCE = 10_000
MOST_DEATHS = 5  # of wandb's own process
# What the environment of a job or of a W&B agent may say: of another run, of how it is logged, of what wandb prints.
NOT_OURS = (
    *("RUN_ID", "RESUME", "RESUME_FROM", "FORK_FROM", "SWEEP_ID", "SWEEP_PARAM_PATH", "SERVICE", "MODE", "DIR"),
    *("SILENT", "QUIET", "SHOW_INFO", "SHOW_WARNINGS", "SHOW_ERRORS"),
)


class WandbError(Exception):
    """W&B cannot be used; the message says why, in one line."""


class WandbRun:
    """The W&B run of one run directory, in this process. What wandb prints belongs into `said`, as standard error."""

    def __init__(self, run: Path, settings: dict[str, Any], mode: str) -> None:
        """`settings`: the section `tracking` of the run's config. `mode`: online | offline."""
        self.path, self.settings, self.mode = run, settings, mode
        self.said = io.StringIO()
        # rows: how many of the file's W&B was given. uploaded, attempt: how many when it was online, and which attempt
        # had written the last of them. surplus: what the server has beside them, since it could not take it back.
        numbers = {"rows": 0, "uploaded": 0, "attempt": 0, "surplus": 0}
        kept = read_json(run / WANDB)
        if not isinstance(kept, dict) or not isinstance(kept.get("id"), str):
            kept = {"id": secrets.token_hex(4)}
        self.state = kept | {name: kept[name] if isinstance(kept.get(name), int) else 0 for name in numbers}
        self._keep()
        self.online = False
        self.deaths = 0
        self.offline_since: str | None = None  # although it was online before: why
        self.wandb: Any = None
        self.run: Any = None
        self.file: IO[bytes] | None = None
        self.next_row = self.sure = 0
        self.redone_until = 0  # steps that W&B has twice, since it could not take back the first ones

    def start(self, seconds: float, or_offline: bool = True) -> str | None:
        """Begin or continue the W&B run within so many seconds; returns why it is offline although it was to be online.

        Raises WandbError if it cannot be logged at all; without `or_offline`, also if it cannot be online.
        """
        until = time.monotonic() + seconds
        for name in NOT_OURS:
            os.environ.pop(f"WANDB_{name}", None)
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # no telemetry, which waits at the end
        # What is written reaches the disk within a second, not fifteen.
        os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")
        try:
            import wandb
        except Exception as error:  # it is not there, or broken
            raise WandbError(f"wandb cannot be imported ({in_short(error)})") from None
        self.wandb = wandb
        kept = count_rows(self.path / METRICS)
        problem = None
        if self.mode == "online":
            try:
                self._start_online(until - OFFLINE_SECONDS)
                self.online = True
            except Exception as error:  # wandb has many
                problem = in_short(error)
                self.run = None
                self._forget()
                if not or_offline:
                    raise WandbError(problem) from None
        if self.run is None:
            try:
                self._init("offline", OFFLINE_SECONDS + 30, resume="allow")
            except Exception as error:
                raise WandbError(in_short(error)) from None
            self.next_row = min(kept, self.state["rows"])
            if self.state["rows"] > kept:
                self.redone_until = set_aside_until(self.path / METRICS)
        self.state["rows"] = min(kept, self.state["rows"])
        self._describe()
        return problem

    def _start_online(self, until: float) -> None:
        """Continue on the server, where it has exactly the rows that count, if it can take back others."""
        self._init("online", until - time.monotonic(), resume="allow")
        right = self._rows_still_right()
        # One row has to stay: if nothing was saved, that of the first logged step, which comes out the same.
        most = max(right + self.state["surplus"], 1)
        if self.run.starting_step > most and not self.state["surplus"]:
            self.run.finish(exit_code=1)
            try:
                self._init("online", until - time.monotonic(), resume_from=f"{self.state['id']}?_step={most - 1}")
            except self.wandb.errors.CommError:
                self._forget()
                self._init("online", until - time.monotonic(), resume="allow")
        there = self.run.starting_step
        if there > most:
            self.state["surplus"] = there - right
        elif there < self.state["surplus"]:  # it was deleted there, or this is another server
            self.state["surplus"] = 0
        if self.state["surplus"]:
            self.redone_until = set_aside_until(self.path / METRICS)
        self.next_row = self.state["uploaded"] = there - self.state["surplus"]

    def _rows_still_right(self) -> int:
        """How many of the rows that were uploaded are still in the file: those that no later attempt did again."""
        count = 0
        with contextlib.suppress(FileNotFoundError), open(self.path / METRICS, "rb") as file:
            for line in itertools.islice(file, self.state["uploaded"]):
                if int(parse_row(line).get("attempt") or 0) > self.state["attempt"]:
                    break
                count += 1
        return count

    def _forget(self) -> None:
        """End wandb's own process, which knows the run's id as in use."""
        with contextlib.suppress(Exception):
            self.wandb.teardown()

    def _init(self, mode: str, seconds: float, **resuming: Any) -> None:
        if "resume" in resuming:
            resuming["id"] = self.state["id"]
        settings = self.wandb.Settings(
            init_timeout=max(1.0, seconds),
            finish_timeout=self.settings["end_seconds"],
            finish_timeout_raises=True,
            # What it would find out by itself holds secrets: argv, environment, git remote, output. We log our own.
            x_disable_meta=True,
            disable_git=True,
            disable_code=True,
            save_code=False,
            console="off",
            quiet=True,
            x_stats_pid=os.getppid(),
        )
        self.run = self.wandb.init(
            mode=mode,
            dir=str(self.path),
            project=self.settings["project"],
            entity=self.settings["entity"],
            group=self.settings["group"],
            tags=self.settings["tags"] or None,
            notes=self.settings["notes"],
            name=self.path.resolve().name,
            settings=settings,
            **resuming,
        )

    def _describe(self) -> None:
        """What the run is: its config, versions, commit and uncommitted changes, as the run directory has them."""
        self.run.define_metric("global_step")
        self.run.define_metric("*", step_metric="global_step")
        config = parse_yaml((self.path / CONFIG).read_text())
        config["environment"] = read_json(self.path / ENVIRONMENT)
        self.run.config.update(config, allow_val_change=True)
        if (self.path / GIT_DIFF).exists():
            self.run.save(str(self.path / GIT_DIFF), base_path=str(self.path), policy="now")
        if self.run.url:
            self.state |= {"url": self.run.url, "project": self.run.project, "entity": self.run.entity}
        self._keep()

    def log_new_rows(self) -> None:
        """Log the rows that were written since the last call."""
        self._in_spite_of_deaths(lambda: None)

    def finish(self, state: str) -> str | None:
        """Log what is left and end the W&B run: finished, stopped (to be continued) or failed.

        Returns why not everything arrived.
        """
        return self._in_spite_of_deaths(lambda: self._finish(state)) or self.offline_since

    def _in_spite_of_deaths(self, function: Callable[[], str | None]) -> str | None:
        """Log new rows, then do this; if wandb's own process dies, begin again and do it then.

        A scheduler that stops a job may send a signal to all of its processes, and that one ends by it.
        """
        while True:
            try:
                if self.run is None:
                    self.offline_since = self.start(self.settings["start_seconds"])
                self._log_new_rows()
                return function()
            except WandbError:
                raise
            except Exception:  # of several kinds
                self.deaths += 1
                if self.deaths > MOST_DEATHS:
                    raise
                self._forget()
                self.run = self.file = None
                self.online = False
                self.state["rows"] = self.sure  # what it was given last may have gone nowhere

    def _log_new_rows(self) -> None:
        if self.file is None:
            with contextlib.suppress(FileNotFoundError):
                self.file = open(self.path / METRICS, "rb")  # noqa: SIM115 - as long as the process
                for _ in range(self.next_row):
                    self.file.readline()
        while rows := self._new_rows():
            self.sure = self.next_row
            self.next_row += len(rows)
            self.state["rows"] = self.next_row  # before they are logged: they may arrive, whatever happens to us
            if self.online:
                self.state |= {"uploaded": self.next_row, "attempt": rows[-1].get("attempt") or 0}
            self._keep()
            for row in rows:
                self.run.log(as_logged(row, self.path, self.redone_until))

    def _new_rows(self) -> list[dict[str, Any]]:
        """The next whole lines of the file; {} for one that is damaged, so that row n stays row n."""
        rows: list[dict[str, Any]] = []
        while self.file is not None and len(rows) < ROWS_AT_ONCE:
            before = self.file.tell()
            line = self.file.readline()
            if not line.endswith(b"\n"):  # none, or one that is being written
                self.file.seek(before)
                break
            rows.append(parse_row(line))
        return rows

    def _finish(self, state: str) -> str | None:
        seconds, status = totals(self.path), read_json(self.path / STATUS)
        summary = {"state": state, "goodput": goodput(seconds)}
        summary |= {f"time/{account}_seconds": value for account, value in seconds.items()}
        best = status.get("best") or {}
        summary |= {f"best/{name}": value for name, value in best.items() if isinstance(value, (int, float))}
        self.run.summary.update(summary)
        if state == "stopped":
            self.run.mark_preempting()  # with an exit code that is not 0, W&B shows it as preempted
        try:
            self.run.finish(exit_code=0 if state == "finished" else 1)
        except TimeoutError:
            return f"the server did not take everything within {self.settings['end_seconds']:g} s"
        said = self.said.getvalue().splitlines()
        if any("not be synced" in line for line in said):  # finish() returns as if nothing were
            reason = [line.removeprefix("wandb: ")[:200] for line in said if "encountered" in line]
            return "the server did not take everything" + (f" ({reason[-1]})" if reason else "")
        return None

    def _keep(self) -> None:
        with contextlib.suppress(OSError):
            write_text(self.path / WANDB, json.dumps(self.state, indent=1) + "\n")


def in_short(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__

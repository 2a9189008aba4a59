"""W&B as a mirror of the run directory, kept by a process of its own: `python -m distloop.tracking.mirror RUN MODE`.

It reads metrics.jsonl as it grows and logs each row, so that training neither imports wandb nor waits for it, and
whatever wandb or its server do cannot reach training. Row n of the file is row n of the W&B run, whichever attempt wrote
it: a start, or `distloop sync`, looks how many rows the server has, takes back those that are done again and gives it
those that it missed. wandb.json in the run directory keeps the run's id.

On standard input it is told how the attempt ended; if its input ends without that, training was killed. On standard
output it says, a JSON object a line, how it started and how it ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import secrets
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from distloop.run_files import CONFIG, ENVIRONMENT, GIT_DIFF, METRICS, STATUS, WANDB, read_json, write_text
from distloop.time_accounts import goodput, totals
from distloop.tracking.metrics_file import count_rows, set_aside_until
from distloop.tracking.wandb_media import media_of
from distloop.yaml_text import parse_yaml

POLL_SECONDS = 0.5
OFFLINE_SECONDS = 3.0  # to begin a run offline, out of the time for the start
AFTER_KILL_SECONDS = 5  # when training was killed: another attempt may follow at once
OTHER_SECONDS = 6.0  # for the mirror of an earlier attempt to end


class MirrorError(Exception):
    """W&B cannot be used; the message says why, in one line."""


class Mirror:
    """The W&B run of one run directory, in this process."""

    def __init__(self, run: Path, settings: dict[str, Any]) -> None:
        """`settings`: the section `tracking` of the run's config."""
        self.path, self.settings = run, settings
        self.state = read_json(run / WANDB)
        if "id" not in self.state:
            self.state = {"id": secrets.token_hex(4), "rows": 0, "surplus": 0}
            self._keep()
        self.wandb: Any = None
        self.run: Any = None
        self.file: IO[bytes] | None = None
        self.redone_until = 0  # steps that W&B has twice, since it could not take back the first ones

    def start(self, mode: str, seconds: float) -> str | None:
        """Begin or continue the W&B run within so many seconds; returns why it is offline although `mode` is online.

        Raises MirrorError if it cannot be logged at all.
        """
        until = time.monotonic() + seconds
        for name in ("WANDB_SILENT", "WANDB_ERROR_REPORTING"):  # one line of ours; no telemetry, which waits at the end
            os.environ[name] = "true" if name == "WANDB_SILENT" else "false"
        # What is written reaches the disk within a second, not fifteen.
        os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")
        try:
            import wandb
        except ImportError as error:
            raise MirrorError(f"wandb cannot be imported ({error})") from None
        self.wandb = wandb
        kept = count_rows(self.path / METRICS)
        problem = None
        if mode == "online":
            try:
                self._start_online(kept, until - OFFLINE_SECONDS)
            except Exception as error:  # wandb has many
                problem = _in_short(error)
                self.wandb.teardown()
        if self.run is None:
            try:
                self._init("offline", OFFLINE_SECONDS + 30, resume="allow")
            except Exception as error:
                raise MirrorError(_in_short(error)) from None
            self.next_row = min(kept, self.state["rows"])
            if self.state["rows"] > kept:
                self.redone_until = set_aside_until(self.path / METRICS)
        self._describe()
        return problem

    def _start_online(self, kept: int, until: float) -> None:
        """Continue on the server, where it has exactly the rows that count, if it can take back others."""
        wanted = kept + self.state["surplus"]
        if self.state["rows"] > kept and wanted < self.state["rows"] + self.state["surplus"]:
            # One row has to stay: if nothing was saved, that of the first logged step, which comes out the same.
            wanted = max(wanted, 1)
            try:
                self._init("online", until - time.monotonic(), resume_from=f"{self.state['id']}?_step={wanted - 1}")
            except self.wandb.errors.CommError:
                self.wandb.teardown()  # which knows the id as in use
        if self.run is None:
            self._init("online", until - time.monotonic(), resume="allow")
        if self.run.starting_step > wanted:
            self.state["surplus"] = self.run.starting_step - kept
            self.redone_until = set_aside_until(self.path / METRICS)
        self.next_row = self.run.starting_step - self.state["surplus"]

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
            silent=True,
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
        if self.file is None:
            with contextlib.suppress(FileNotFoundError):
                self.file = open(self.path / METRICS, "rb")  # noqa: SIM115 - as long as the process
                for _ in range(self.next_row):
                    self.file.readline()
        while self.file is not None:
            before = self.file.tell()
            line = self.file.readline()
            if not line.endswith(b"\n"):  # none, or one that is being written
                self.file.seek(before)
                return
            self.next_row += 1
            if self.next_row > self.state["rows"] or self.next_row % 1000 == 0:
                self.state["rows"] = self.next_row  # before it is logged: it may arrive, whatever happens to us
                self._keep()
            with contextlib.suppress(ValueError):
                self.run.log(self._as_logged(json.loads(line)))

    def _as_logged(self, row: dict[str, Any]) -> dict[str, Any]:
        kind, step = row.pop("kind"), row.pop("step")
        logged = {"global_step": step, "epoch": row.pop("epoch"), "attempt": row.pop("attempt")}
        if "time" in row:
            logged["_timestamp"] = row.pop("time")
        if step <= self.redone_until:
            logged["redone"] = 1
        for name, value in row.items():
            if isinstance(value, list) and all(isinstance(each, (int, float)) for each in value):  # one for each rank
                logged |= {f"{kind}/{name}/rank_{rank}": each for rank, each in enumerate(value)}
            else:
                logged[f"{kind}/{name}"] = math.nan if value is None else value
        if kind == "validate":
            logged |= media_of(self.path, step)
        return logged

    def finish(self, state: str) -> str | None:
        """End the W&B run: finished, stopped (to be continued) or failed; returns why not everything arrived."""
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
        return None

    def _keep(self) -> None:
        with contextlib.suppress(OSError):
            write_text(self.path / WANDB, json.dumps(self.state, indent=1) + "\n")


@contextlib.contextmanager
def alone(run: Path, seconds: float) -> Iterator[bool]:
    """Whether no other mirror of the run is, after waiting so many seconds for it to end."""
    with contextlib.ExitStack() as stack:
        until = time.monotonic() + seconds
        file = stack.enter_context(open(run / f".{WANDB}.lock", "w"))
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < until:
                    time.sleep(0.1)
                    continue
                yield False
                return
            except OSError:  # a file system without locks
                pass
            yield True
            return


def _in_short(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def _say(**message: Any) -> None:
    with contextlib.suppress(OSError):
        print(json.dumps(message), flush=True)


def main(arguments: list[str]) -> None:
    """Mirror the run until training ends. Arguments: the run's directory, online | offline."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for training, which tells how it ends
    path, mode = Path(arguments[0]), arguments[1]
    settings = parse_yaml((path / CONFIG).read_text())["tracking"]
    with alone(path, OTHER_SECONDS):
        mirror = Mirror(path, settings)
        try:
            problem = mirror.start(mode, settings["start_seconds"])
        except MirrorError as error:
            _say(started=False, problem=str(error))
            return
        _say(started=True, problem=problem, url=mirror.run.url)
        state, training = None, os.getppid()
        while state is None:
            if select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
                told = sys.stdin.readline()
                state = json.loads(told)["state"] if told else "killed"
            elif os.getppid() != training:  # loader workers may keep the other end of our input open for a while
                state = "killed"
            mirror.log_new_rows()
        if state == "killed":
            threading.Timer(AFTER_KILL_SECONDS, os._exit, (1,)).start()
        _say(problem=mirror.finish(state))


if __name__ == "__main__":
    main(sys.argv[1:])
    os._exit(0)  # wandb's own exit hooks may wait for a server

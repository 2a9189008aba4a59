"""Training's side of the W&B mirror: starts its process, tells it how training ends, never waits without a limit."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distloop.config.settings import Tracking
from distloop.tracking.wandb.rows import parse_row

LEAST_SECONDS = 3.0  # for the process to end in, also where nobody waits for it


def wandb_mode(settings: Tracking, environ: Mapping[str, str]) -> str | None:
    """online, offline or None: as set, and as W&B's own variable restricts it."""
    if settings.wandb == "off" or environ.get("WANDB_MODE") == "disabled":
        return None
    return "offline" if environ.get("WANDB_MODE") in ("offline", "dryrun") else settings.wandb


def own_python(module: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Command and environment that run a module of this package, installed or not, whatever lies in the folder here."""
    package = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    return [sys.executable, "-P", "-m", module, *arguments], {**os.environ, "PYTHONPATH": path}


class WandbProcess:
    """The process that mirrors the run to W&B. Its session is its own, so that no Ctrl-C reaches it."""

    def __init__(self, run: Path, settings: Tracking, mode: str) -> None:
        self.run, self.settings = run, settings
        self.begun = time.monotonic()
        self.url: str | None = None
        self.rest = b""
        self.process: subprocess.Popen[bytes] | None = None
        self.problem = "its process has ended"
        command, environment = own_python("distloop.tracking.wandb.mirror", str(run), mode)
        try:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            self.problem = f"no process can be started ({error.strerror})"

    def started(self, waiting: Callable[[], Any]) -> str:
        """Wait until W&B has started, at most start_seconds since the beginning; the line to say about it.

        `waiting` is called now and then; a true answer ends it.
        """
        answer = self._answer(self.begun + self.settings.start_seconds - time.monotonic(), waiting)
        sync = f"`distloop sync {shlex.quote(str(self.run))}` uploads it"
        if answer is None:
            waited = "yet" if waiting() else f"within {self.settings.start_seconds:g} s"
            return f"W&B has not started {waited}; training goes on. {sync}"
        if not answer.get("started"):
            self._end(0.5)
            return f"W&B is off: {answer.get('problem')}. Later {sync}"
        self.url = answer.get("url")
        if answer.get("problem"):
            return f"W&B is offline, in {self.run / 'wandb'}: {answer['problem']}. Later {sync}"
        return f"W&B: {self.url}" if self.url else f"W&B: offline, in {self.run / 'wandb'}; {sync}"

    def finish(self, state: str, seconds: float, waiting: Callable[[], Any]) -> str | None:
        """Tell it that training has ended (finished | stopped | failed) and wait so many seconds at most.

        Returns the line to say if not everything has arrived.
        """
        if self.process is None:
            return None
        told = {"state": state, "seconds": max(seconds, LEAST_SECONDS)}
        with contextlib.suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(told).encode() + b"\n")
            self.process.stdin.flush()
        until = time.monotonic() + seconds
        answer = self._answer(seconds, lambda: waiting() and False)
        if answer is not None and "started" in answer:  # it came after we had stopped waiting for it
            left = until - time.monotonic()
            answer = self._answer(left, lambda: waiting() and False) if answer["started"] else answer
        problem = f"no answer within {seconds:.0f} s" if answer is None else answer.get("problem")
        if seconds:
            self._end(0.0 if answer is None else 0.5)
        return f"W&B: {problem}; `distloop sync {shlex.quote(str(self.run))}` uploads the rest" if problem else None

    def _end(self, seconds: float) -> None:
        """See that the process ends, killed if it has not done so after so many seconds."""
        process, self.process = self.process, None
        if process is not None:
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _answer(self, seconds: float, ended: Callable[[], Any]) -> dict[str, Any] | None:
        """What the process says next; only a problem if it has ended, None if it says nothing in time."""
        if self.process is None:
            return {"problem": self.problem}
        assert self.process.stdout is not None
        pipe = self.process.stdout.fileno()
        poll = select.poll()  # select() cannot wait for numbers above 1023, and data sets open many files
        poll.register(pipe, select.POLLIN)
        until = time.monotonic() + seconds
        while True:
            while b"\n" in self.rest:
                line, self.rest = self.rest.split(b"\n", 1)
                if answer := parse_row(line):  # whatever else a library prints is none
                    return answer
            left = until - time.monotonic()
            if left <= 0 or ended():
                return None
            if poll.poll(1000 * min(left, 0.2)):
                text = os.read(pipe, 65536)
                if not text:
                    return {"problem": self.problem}
                self.rest += text

"""Training's side of the W&B mirror: starts its process, tells it how training ends, and waits with a limit."""

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

from distloop.config.places import shown
from distloop.config.settings import Tracking
from distloop.tracking.wandb.rows import parse_row

LEAST_SECONDS = 3.0  # for the process to end in, even if nobody waits for it


def wandb_mode(settings: Tracking, environ: Mapping[str, str]) -> str | None:
    """online, offline or None (off): what `tracking.wandb` says; the variable WANDB_MODE may only restrict it."""
    if settings.wandb == "off" or environ.get("WANDB_MODE") == "disabled":
        return None
    return "offline" if environ.get("WANDB_MODE") in ("offline", "dryrun") else settings.wandb


def own_python(module: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """(command, environment) to run a module of this package, installed or not, but not from the working folder."""
    package, others = str(Path(__file__).resolve().parents[3]), os.environ.get("PYTHONPATH")
    path = f"{package}{os.pathsep}{others}" if others else package
    return [sys.executable, "-P", "-m", module, *arguments], {**os.environ, "PYTHONPATH": path}


class WandbProcess:
    """The process that mirrors the run to W&B. It has a session of its own, so that no Ctrl-C reaches it."""

    def __init__(self, run: Path, settings: Tracking, mode: str) -> None:
        self.run, self.settings = run, settings
        self.start_time = time.monotonic()
        self.url: str | None = None
        self.unread = b""  # the beginning of an answer that has not arrived whole
        self.process: subprocess.Popen[bytes] | None = None
        self.problem = "its process has ended"
        command, environment = own_python("distloop.tracking.wandb.mirror", str(run), mode)
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        try:
            self.process = subprocess.Popen(
                command, bufsize=0, env=environment, stdin=pipe, stdout=pipe, stderr=nothing, start_new_session=True
            )
        except OSError as error:
            self.problem = f"no process can be started ({error.strerror})"

    def started(self, waiting: Callable[[], Any]) -> str:
        """Wait until W&B has started, at most start_seconds since __init__; returns a line about it for people.

        `waiting` is called several times a second; the wait ends when it returns something true.
        """
        answer = self._answer(self.start_time + self.settings.start_seconds - time.monotonic(), waiting)
        sync = f"`distloop sync {shlex.quote(shown(self.run))}` uploads it"
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
        """Tell the process that training has ended (finished | stopped | failed) and wait at most `seconds`.

        `waiting` is called several times a second. Returns a line for people if not all data has arrived, else None.
        """
        if self.process is None:
            return None
        end = {"state": state, "seconds": max(seconds, LEAST_SECONDS)}
        with contextlib.suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(end).encode() + b"\n")
        deadline = time.monotonic() + seconds
        answer = self._answer(seconds, lambda: waiting() and False)
        if answer and answer.get("started"):  # this answer came after started() had stopped waiting for it
            answer = self._answer(deadline - time.monotonic(), lambda: waiting() and False)
        problem = f"no answer within {seconds:.0f} s" if answer is None else answer.get("problem")
        if seconds:
            self._end(0.0 if answer is None else 0.5)
        return f"W&B: {problem}; `distloop sync {shlex.quote(shown(self.run))}` uploads the rest" if problem else None

    def _end(self, seconds: float) -> None:
        """Wait for the end of the process, and kill it after so many seconds."""
        process, self.process = self.process, None
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            process.kill()  # does nothing if the process has ended
            process.wait()

    def _answer(self, seconds: float, gives_up: Callable[[], Any]) -> dict[str, Any] | None:
        """The next answer of the process: a problem if the process has ended, None if no answer comes in time."""
        if self.process is None:
            return {"problem": self.problem}
        assert self.process.stdout is not None
        pipe = self.process.stdout.fileno()
        poll = select.poll()  # select() fails for descriptors above 1023, and a data set may hold many files open
        poll.register(pipe, select.POLLIN)
        deadline = time.monotonic() + seconds
        while True:
            while b"\n" in self.unread:
                line, self.unread = self.unread.split(b"\n", 1)
                if answer := parse_row(line):  # {} for what a library has printed
                    return answer
            left = deadline - time.monotonic()
            if left <= 0 or gives_up():
                return None
            if poll.poll(1000 * min(left, 0.2)):
                if not (text := os.read(pipe, 65536)):
                    return {"problem": self.problem}
                self.unread += text

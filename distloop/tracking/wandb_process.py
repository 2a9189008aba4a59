"""Training's side of the W&B mirror: starts its process, tells it how training ends, and never waits without a limit."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distloop.config import Tracking


def wandb_mode(settings: Tracking, environ: Mapping[str, str]) -> str | None:
    """online, offline or None: as set, and as W&B's own variable restricts it."""
    if settings.wandb == "off" or environ.get("WANDB_MODE") == "disabled":
        return None
    return "offline" if environ.get("WANDB_MODE") in ("offline", "dryrun") else settings.wandb


def own_python(module: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Command and environment that run a module of this package, installed or not."""
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    return [sys.executable, "-m", module, *arguments], {**os.environ, "PYTHONPATH": path}


class WandbProcess:
    """The process that mirrors the run to W&B. Its session is its own, so that no Ctrl-C reaches it."""

    def __init__(self, run: Path, settings: Tracking, mode: str) -> None:
        self.run, self.settings, self.mode = run, settings, mode
        self.begun = time.monotonic()
        self.url: str | None = None
        self.rest = b""
        command, environment = own_python("distloop.tracking.mirror", str(run), mode)
        with contextlib.suppress(OSError):
            (run / "wandb").mkdir(exist_ok=True)
        self.process: subprocess.Popen[bytes] | None = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def started(self, waiting: Callable[[], Any]) -> str:
        """Wait until W&B has started, at most start_seconds since the beginning; the line to say about it.

        `waiting` is called now and then; a true answer ends it.
        """
        answer = self._answer(self.begun + self.settings.start_seconds - time.monotonic(), waiting)
        sync = f"`distloop sync {self.run}` uploads it"
        if answer is None:
            return f"W&B has not started within {self.settings.start_seconds:g} s; training goes on. {sync}"
        if not answer.get("started"):
            self.process = None
            return f"W&B is off: {answer.get('problem') or 'its process has ended'}. Later {sync}"
        self.url = answer["url"]
        if answer["problem"]:
            return f"W&B is offline, in {self.run / 'wandb'}: {answer['problem']}. Later {sync}"
        return f"W&B: {self.url}" if self.url else f"W&B: offline, in {self.run / 'wandb'}; {sync}"

    def finish(self, state: str, seconds: float, waiting: Callable[[], Any]) -> str | None:
        """Tell it that training has ended (finished | stopped | failed) and wait so many seconds at most.

        Returns the line to say if not everything has arrived.
        """
        if self.process is None:
            return None
        with contextlib.suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps({"state": state}).encode() + b"\n")
            self.process.stdin.flush()
        until = time.monotonic() + seconds
        answer = self._answer(seconds, lambda: waiting() and False)
        if answer is not None and "started" in answer:  # it came after we had stopped waiting for it
            answer = self._answer(until - time.monotonic(), lambda: waiting() and False) if answer["started"] else answer
        problem = f"no answer within {seconds:.0f} s" if answer is None else answer.get("problem")
        if answer is None and seconds:
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return f"W&B: {problem}; `distloop sync {self.run}` uploads the rest" if problem else None

    def _answer(self, seconds: float, ended: Callable[[], Any]) -> dict[str, Any] | None:
        """What the process says next; {} if it has ended, None if it says nothing in time."""
        assert self.process is not None
        assert self.process.stdout is not None
        until = time.monotonic() + seconds
        while b"\n" not in self.rest:
            left = until - time.monotonic()
            if left <= 0 or ended():
                return None
            if select.select([self.process.stdout], [], [], min(left, 0.2))[0]:
                text = os.read(self.process.stdout.fileno(), 65536)
                if not text:
                    return {"problem": "its process has ended"}
                self.rest += text
        line, self.rest = self.rest.split(b"\n", 1)
        return json.loads(line)

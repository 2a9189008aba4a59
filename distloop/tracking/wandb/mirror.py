"""W&B as a mirror of the run directory, kept by a process of its own: `python -m distloop.tracking.mirror RUN MODE`.

It reads metrics.jsonl as it grows and logs each row, so that training neither imports wandb nor waits for it, and
whatever wandb or its server do cannot reach training.

On standard input it is told how the attempt ended; if its input ends without that, training was killed. On standard
output it says, a JSON object a line, how it started and how it ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distloop.config.yaml_text import parse_yaml
from distloop.run.files import CONFIG, STATUS, WANDB, read_json
from distloop.tracking.wandb.rows import parse_row
from distloop.tracking.wandb.run import WandbError, WandbRun, in_short

POLL_SECONDS = 0.5
AFTER_KILL_SECONDS = 5.0  # when training was killed: another attempt may follow at once
OTHER_SECONDS = 8.0  # for the mirror of an earlier attempt to end
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


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


def mirror_training(path: Path, mode: str, say: Callable[..., None]) -> None:
    """Mirror the run until the parent process, which trains, has told how it ends, or has ended; `say` tells it."""
    training = os.getppid()
    wandb_run = WandbRun(path, parse_yaml((path / CONFIG).read_text())["tracking"], mode)
    sys.stderr = wandb_run.said
    try:
        problem = wandb_run.start(wandb_run.settings["start_seconds"])
    except WandbError as error:
        say(started=False, problem=str(error))
        return
    say(started=True, problem=problem, url=wandb_run.run.url)
    told: dict[str, Any] = {}
    while not told:
        if select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
            told = parse_row(sys.stdin.readline().encode()) or _end_of_killed(path)
        elif os.getppid() != training:  # loader workers may keep the other end of our input open for a while
            told = _end_of_killed(path)
        wandb_run.log_new_rows()
    threading.Timer(told["seconds"], os._exit, (1,)).start()
    say(problem=wandb_run.finish(told["state"]))


def _end_of_killed(path: Path) -> dict[str, Any]:
    state = read_json(path / STATUS).get("state")  # it may have ended in order before
    return {"state": state if state in ("finished", "stopped") else "failed", "seconds": AFTER_KILL_SECONDS}


def main(arguments: list[str]) -> None:
    """Mirror a run beside its training. Arguments: the run's directory, online | offline."""
    for number in STOPPING:  # meant for training, which tells how it ends
        signal.signal(number, signal.SIG_IGN)
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer

    def say(**message: Any) -> None:
        with contextlib.suppress(OSError):
            os.write(answers, json.dumps(message).encode() + b"\n")

    path = Path(arguments[0])
    try:
        with alone(path, OTHER_SECONDS) as is_alone:
            if not is_alone:
                say(started=False, problem="a sync, or the W&B process of an earlier attempt, is still at it")
                return
            mirror_training(path, arguments[1], say)
    except Exception as error:
        say(problem=in_short(error))


if __name__ == "__main__":
    main(sys.argv[1:])
    os._exit(0)  # wandb's own exit hooks may wait for a server

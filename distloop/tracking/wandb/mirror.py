"""The process that mirrors a run to W&B: `python -m distloop.tracking.wandb.mirror RUN MODE`.

It reads metrics.jsonl as the file grows and logs each row. So training neither imports wandb nor waits for it, and
no failure of wandb or of its server reaches training.

Standard input brings how the attempt has ended; it ends without that if training was killed. Standard output gets a
JSON object a line: how the mirror has started, and how it has ended.
"""

import contextlib
import json
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from distloop.config.yaml_text import parse_yaml
from distloop.run.files import CONFIG, STATUS, WANDB, read_json
from distloop.tracking.wandb.rows import parse_row
from distloop.tracking.wandb.run import WandbRun
from distloop.tracking.wandb.session import WandbError, one_line

POLL_SECONDS = 0.5
KILLED_SECONDS = 5.0  # to end in after training was killed: the next attempt may follow at once
OTHER_SECONDS = 8.0  # to wait for the mirror of an earlier attempt
SIGNALS_OF_TRAINING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


@contextlib.contextmanager
def only_mirror(run: Path, seconds: float) -> Iterator[bool]:
    """True while this process is the only one that uploads the run; False if another still does so after `seconds`."""
    lock = FileLock(run / f".{WANDB}.lock", timeout=seconds, poll_interval=0.1, fallback_to_soft=False)
    is_only = True
    try:
        lock.acquire()
    except Timeout:
        is_only = False
    except OSError:  # the file system has no locks: each says so in its own way
        pass
    try:
        yield is_only
    finally:
        lock.release()


def mirror_training(path: Path, mode: str, answer: Callable[..., None]) -> None:
    """Mirror the run until training, the parent process, has sent how it ends or is gone. `answer` informs training."""
    training = os.getppid()
    wandb_run = WandbRun(path, parse_yaml((path / CONFIG).read_text(encoding="utf-8"))["tracking"], mode)
    sys.stderr = wandb_run.output
    try:
        problem = wandb_run.start(wandb_run.settings["start_seconds"])
    except WandbError as error:
        answer(started=False, problem=str(error))
        return
    answer(started=True, problem=problem, url=wandb_run.run.url)
    end: dict[str, Any] = {}
    while not end:
        if select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
            end = parse_row(sys.stdin.readline().encode()) or _end_of_killed(path)
        elif os.getppid() != training:  # loader workers may hold the other end of standard input open for a while
            end = _end_of_killed(path)
        wandb_run.log_new_rows()
    threading.Timer(end["seconds"], os._exit, (1,)).start()
    answer(problem=wandb_run.finish(end["state"]))


def _end_of_killed(path: Path) -> dict[str, Any]:
    """What training would have sent, which was killed. It may have finished or stopped in order before."""
    state = read_json(path / STATUS).get("state")
    return {"state": state if state in ("finished", "stopped") else "failed", "seconds": KILLED_SECONDS}


def main(arguments: list[str]) -> None:
    """Mirror a run while it trains. Arguments: the run's directory, and online | offline."""
    for number in SIGNALS_OF_TRAINING:  # training answers them, and then sends how it ends
        signal.signal(number, signal.SIG_IGN)
    answers = os.dup(1)
    os.dup2(2, 1)  # so that what libraries print is not taken for an answer

    def answer(**message: Any) -> None:
        with contextlib.suppress(OSError):
            os.write(answers, json.dumps(message).encode() + b"\n")

    path = Path(arguments[0])
    try:
        with only_mirror(path, OTHER_SECONDS) as is_only:
            if not is_only:
                answer(started=False, problem="a sync, or the W&B process of an earlier attempt, is still at it")
                return
            mirror_training(path, arguments[1], answer)
    except Exception as error:
        answer(problem=one_line(error))


if __name__ == "__main__":
    main(sys.argv[1:])
    os._exit(0)  # wandb's exit hooks may wait for a server

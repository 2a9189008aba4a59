"""How a process ends: without its loader workers, without hanging in a library, with its exit code."""

import atexit
import contextlib
import multiprocessing
import multiprocessing.util  # registers its own end before ours, so that ours comes first
import os
import signal
import sys
import threading
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""The signals that ask for a stop."""


def kill_workers() -> None:
    """Kill the loader workers: they ignore SIGTERM (data/workers.py), which multiprocessing would send."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error when a worker ends
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def leave(code: int) -> NoReturn:
    """End the process with this exit code, after its workers and the libraries' exit functions."""
    kill_workers()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if code != 130 and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        atexit._run_exitfuncs()  # libraries end their work here, as at sys.exit
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    end_at_once(code)


def end_at_once(code: int) -> NoReturn:
    """End the process without the interpreter's shutdown. Each end of a training process calls this. With torch loaded,
    the shutdown takes seconds; with gloo or NCCL it sometimes aborts, or hangs if a peer is gone."""
    os._exit(code)

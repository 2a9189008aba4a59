"""How a process ends: without its loader workers, without hanging in a library, with its exit code."""

from __future__ import annotations

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
    """End the loader workers. multiprocessing would send SIGTERM, which they ignore (data/workers.py), and wait."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes the end of a worker for an accident
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def leave(code: int) -> NoReturn:
    """End the process with this exit code, once all that has to be closed is closed."""
    kill_workers()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # nothing is left to stop, and Python gives its handlers up as it ends
    if code != 130 and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        atexit._run_exitfuncs()  # libraries end their work here, as at sys.exit
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    end_at_once(code)


def end_at_once(code: int) -> NoReturn:
    """End the process without taking the interpreter down. All ends of a training process come through here.

    With torch loaded, an interpreter's end takes seconds; with gloo or NCCL it sometimes aborts, or hangs where a
    peer is gone.
    """
    os._exit(code)

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


@atexit.register
def kill_workers() -> None:
    """End loader workers: multiprocessing asks its daemons by SIGTERM and waits, but ours do not listen to it."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes the end of a worker for an accident
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def leave(code: int) -> None:
    """End the process with this exit code."""
    kill_workers()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # nothing is left to stop, and Python gives its handlers up as it ends
    if code != 130 and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        atexit._run_exitfuncs()  # what libraries have to bring to an end, as sys.exit would
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    # Without taking the interpreter down: that takes seconds once torch is loaded, and with gloo or NCCL it now and
    # then aborts, or hangs where a peer is gone. What has to be closed is closed.
    os._exit(code)

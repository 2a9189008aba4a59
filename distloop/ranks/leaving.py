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

from distloop.ranks.talking import say

OTHERS_SECONDS = 10.0  # for threads and processes that user code has started, and for libraries' exit functions
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""The signals that ask for a stop."""


def kill_workers(pools: bool = False) -> None:
    """Kill the loader workers: they ignore SIGTERM (data/workers.py), which multiprocessing would send. `pools`: those
    of a Pool, too, which starts others in their place, or hangs, as long as it has not ended by itself."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error when a worker ends
    for child in multiprocessing.active_children():
        if child.daemon and (pools or "PoolWorker" not in child.name):  # as multiprocessing names them
            child.kill()


def leave(code: int) -> NoReturn:
    """End the process with this exit code, after its workers and the libraries' exit functions. In order (code 0) it
    also waits for threads and processes that user code has started, as Python does, but for OTHERS_SECONDS at most."""
    kill_workers()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    timer = threading.Timer(OTHERS_SECONDS, _end_without_others, (code,))
    timer.daemon = True
    timer.start()
    if code == 0:
        threading._shutdown()  # type: ignore[attr-defined] # lets executors finish, and joins threads
    if code != 130 and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        atexit._run_exitfuncs()  # libraries and user code end their work here, then multiprocessing, as at sys.exit
    elif code == 0:
        multiprocessing.util._exit_function()  # type: ignore[attr-defined] # ends pools and managers, and joins processes
    kill_workers(pools=True)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    end_at_once(code)


def _end_without_others(code: int) -> NoReturn:
    """End the process, and say what it leaves behind. Daemons go with it."""
    try:
        others = [one for one in threading.enumerate() if not (one.daemon or one is threading.main_thread())]
        left = [f"the thread {one.name}" for one in others]
        processes = [one for one in multiprocessing.active_children() if not one.daemon]
        left += [f"the process {one.name} ({one.pid}), which goes on" for one in processes]
        what = ", ".join(left) or "an exit function (atexit) of a library or of your code"
        say(f"distloop: did not wait longer than {OTHERS_SECONDS:.0f} s for {what}", sys.stderr)
        kill_workers(pools=True)
    finally:
        end_at_once(code)


def end_at_once(code: int) -> NoReturn:
    """End the process without the interpreter's shutdown. Each end of a training process calls this. With torch loaded,
    the shutdown takes seconds; with gloo or NCCL it sometimes aborts, or hangs if a peer is gone."""
    os._exit(code)

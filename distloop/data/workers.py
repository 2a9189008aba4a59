"""Signals in loader workers: they ignore signals to stop, and end with the process that started them."""

import contextlib
import ctypes
import multiprocessing
import signal
import sys
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from typing import Any

from distloop.ranks.leaving import SIGNALS, end_at_once


def start_forkserver(context: Any = None) -> None:
    """Start multiprocessing's fork server, if loader workers of this context (None: the usual one) come from it: with
    SIGNALS blocked, since they reach the whole process group."""
    if (context or multiprocessing).get_start_method() != "forkserver":
        return
    resource_tracker.ensure_running()  # before, because it unblocks signals
    with signals_blocked():
        forkserver.ensure_running()


def leave_signals_to_parent(worker: int = 0) -> None:
    """In a loader worker, ignore SIGNALS: the parent process decides about a stop. Die when the parent dies."""
    signal.set_wakeup_fd(-1)  # the file descriptor that the fork copied is the parent's
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked by the parent: see signals_blocked
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it died before that
        end_at_once(1)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block SIGNALS while loader workers start: a new process has them blocked, too, until it ignores them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

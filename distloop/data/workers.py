"""Signals in loader workers: a stop is the business of the process that they work for."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import signal
import sys
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker

from distloop.ranks.leaving import SIGNALS, end_at_once

PR_SET_PDEATHSIG = 1


def start_forkserver() -> None:
    """Start multiprocessing's server for loader workers with these signals blocked: they reach a whole group."""
    resource_tracker.ensure_running()  # first: it unblocks them
    with signals_blocked():
        forkserver.ensure_running()


def leave_signals_to_parent(worker: int = 0) -> None:
    """For a loader worker: a stop is the business of the process that it works for, with which it ends."""
    signal.set_wakeup_fd(-1)  # what the fork copied is the parent's
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # only now: see signals_blocked
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it died before that
        end_at_once(1)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """For starting loader workers: until they ignore these signals they have them blocked, as a copy of this thread."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

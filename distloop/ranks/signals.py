"""The signals that ask for a stop. User code and libraries may take them away: they are taken back, and a handler that
stood in their place is called as well."""

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from distloop.ranks.leaving import SIGNALS
from distloop.ranks.talking import say

IGNORABLE = (signal.SIGINT, signal.SIGHUP)
"""What a shell script ignores for `command &`, and nohup for all that it starts: those stay ignored."""

_process: int | None = None  # global, as signals are: the process that has them; its children by fork do not
_mask = threading.local()  # global, as hooks at a fork are: the signals that were blocked before it


class Signals:
    """Receives the process's signals: read() returns their numbers in any thread, also while the main thread computes.
    `on_signal(number)` is called in the main thread, some time later."""

    def __init__(self, on_signal: Callable[[int], None]) -> None:
        """Call it in the main thread, as arm()."""
        self.taken = False  # by other code, as far as another thread can see
        self._on_signal = on_signal
        self._users: dict[int, Callable[..., Any]] = {}  # handlers of other code
        self._calls_user = False
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._numbers = [number for number in SIGNALS if not _stays_ignored(number)]
        _leave_to_parent_after_fork()
        self.arm()

    def read(self, seconds: float) -> bytes:
        """The numbers of the signals that arrive within so many seconds; returns with the first. Sets `taken`."""
        numbers = os.read(self._read, 4096) if select.select([self._read], [], [], seconds)[0] else b""
        self.taken = any(signal.getsignal(number) != self._handle for number in self._own())
        return numbers

    def arm(self) -> str:
        """Receive the signals, also those that other code has taken since; says which those are, or "". It sees no
        handler of C code (faulthandler.register), and replaces it. Call it in the main thread."""
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        said = []
        for number in self._own():
            before = signal.signal(number, self._handle)
            name = signal.Signals(number).name
            if callable(before) and before not in (self._handle, signal.default_int_handler):
                if self._users.get(number) != before:
                    said.append(f"{name} asks for a stop, and calls {_name_of(before)} as well")
                self._users[number] = before
            elif before not in (self._handle, signal.SIG_DFL, signal.default_int_handler):
                said.append(f"{name}, which other code ignored, asks for a stop")
        self.taken = False
        return "; ".join(said)

    def _own(self) -> list[signal.Signals]:
        """The signals to receive: without SIGHUP if user code ignores it, which is what nohup does."""
        ignores_hangup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        return [number for number in self._numbers if not (number == signal.SIGHUP and ignores_hangup)]

    def _handle(self, number: int, frame: object) -> None:
        """Python's signal handler. It may run late; read() has returned the number before."""
        before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        if before != self._write:  # other code took it (asyncio does): read() knows nothing of this signal
            with contextlib.suppress(BlockingIOError):
                os.write(self._write, bytes([number]))
            with contextlib.suppress(OSError, ValueError):  # it is closed
                if before != -1:
                    signal.set_wakeup_fd(before, warn_on_full_buffer=False)  # the loop in which this happens needs it
        self._on_signal(number)
        if number in self._users and not self._calls_user:  # a handler may call the one before it: this one
            self._calls_user = True
            try:
                self._users[number](number, frame)
            except (SystemExit, KeyboardInterrupt):
                pass  # the run saves before it ends
            except Exception as error:
                what = f"{_name_of(self._users[number])}, a handler of {signal.Signals(number).name}, raised"
                say(
                    f"distloop: {what} {type(error).__name__}: {error}; the run saves and stops all the same",
                    sys.stderr,
                )
            finally:
                self._calls_user = False


def _stays_ignored(number: int) -> bool:
    return number in IGNORABLE and signal.getsignal(number) == signal.SIG_IGN


def _name_of(handler: Callable[..., Any]) -> str:
    return f"{getattr(handler, '__module__', '?')}.{getattr(handler, '__qualname__', type(handler).__qualname__)}"


def _leave_to_parent_after_fork() -> None:
    """Let children by fork (a Pool of the user's) be: this process's wakeup pipe would hear of their signals. Slurm and
    a terminal signal all processes, and the run needs its helpers to get to its save, so that they ignore what asks for
    a stop, but for SIGTERM: Pool.terminate() and Process.terminate() send it."""
    global _process
    if _process is None:
        os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_reset_in_child)
    _process = os.getpid()


def _block() -> None:
    """A signal to the child waits until its handlers are its own."""
    _mask.before_fork = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before_fork)


def _reset_in_child() -> None:
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    _unblock()

"""Places in user code at which a test can hold a rank, make it fail, or send it a signal (see tests/tools/stage.py).

User code calls `stage.at("update", step)`. What is to happen there stands in stage/PLACE.json in the working directory,
not in the config: the next start of the same run continues it. stage/PLACE.RANK says that a rank is there, or was.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

LIMIT = 250  # seconds that a rank is held at most, so that none outlives a test that forgot it


def at(place: str, count: int = 1) -> None:
    """Do what the test asks for at this place, if it means this rank and this `count`: the step, or the call."""
    folder, rank = Path("stage").absolute(), int(os.environ.get("RANK", 0))
    asked_in = folder / f"{place}.json"
    try:
        asked = json.loads(asked_in.read_text())
    except FileNotFoundError:
        return
    if asked["rank"] not in (None, rank) or not asked["first"] <= count <= (asked["last"] or count):
        return
    came, do = folder / f"{place}.{rank}", asked["do"]
    if do == "hold":
        came.touch()
        wait_while(asked_in)
        came.unlink(missing_ok=True)
    elif do == "hold in C":
        hold_in_c(asked_in, came)
    elif not came.exists():  # once: the same run, started again, goes on
        came.touch()
        os.kill(os.getpid(), signal.Signals[do]) if do.startswith("SIG") else fail(do)


def wait_while(file: Path) -> None:
    """Wait until the file is gone."""
    deadline = time.monotonic() + LIMIT
    while file.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no test has removed {file} in {LIMIT} s")
        time.sleep(0.01)


def hold_in_c(asked_in: Path, came: Path) -> None:
    """Wait for a mutex, as uninterruptibly as in a collective: no Python handler runs, but other threads do."""
    library = ctypes.CDLL(None)
    mutex = ctypes.create_string_buffer(64)  # zeros are an open mutex
    library.pthread_mutex_lock(mutex)

    def let_go() -> None:
        sleeping = 0
        while sleeping < 10:  # the main thread is in there by now, not about to be
            time.sleep(0.01)
            state = Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[0]
            sleeping = sleeping + 1 if state == "S" else 0
        came.touch()
        wait_while(asked_in)
        came.unlink(missing_ok=True)
        library.pthread_mutex_unlock(mutex)

    threading.Thread(target=let_go, daemon=True).start()
    library.pthread_mutex_lock(mutex)


def fail(how: str) -> None:
    """Fail in one of WAYS_TO_FAIL. Functions here are named in tracebacks that tests look for."""
    WAYS_TO_FAIL[how]()


def fail_by_exception() -> None:
    raise ValueError("a value that nobody likes")


def fail_by_own_connection() -> None:
    raise ConnectionResetError(104, "Connection reset by peer")


def fail_by_own_database() -> None:
    raise RuntimeError("Connection closed by peer: the database of the user")


def fail_by_mistake() -> None:
    from distloop.errors import UsageError

    raise UsageError("tests.lab.stage: this is used wrongly; use it rightly.")


def fail_by_endless_loop() -> None:
    while True:
        pass


WAYS_TO_FAIL: dict[str, Callable[[], object]] = {
    "raise": fail_by_exception,
    "reset": fail_by_own_connection,
    "runtime": fail_by_own_database,
    "mistake": fail_by_mistake,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "os._exit": lambda: os._exit(0),
    "sys.exit": lambda: sys.exit(0),
    "segfault": lambda: ctypes.string_at(0),
    "suspend": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "loop": fail_by_endless_loop,
}

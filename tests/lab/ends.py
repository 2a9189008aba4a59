"""User code that takes signals for itself, ends the process on its own, or starts what outlives it."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distloop.ranks import leaving, stopping, verdicts
from tests.lab import stage
from tests.lab.points import line
from tests.lab.stopping import Waiting


def note(*_: object) -> None:
    """A handler that wants to know of a signal."""
    Path("noted").touch()


def leave(*_: object) -> None:
    """A handler as many write it: the process is to end."""
    note()
    sys.exit(3)


def fail(*_: object) -> None:
    note()
    raise ValueError("as in a handler of a user's")


def call_the_one_before() -> None:
    before: Any = signal.getsignal(signal.SIGTERM)

    def call_both(*arguments: object) -> None:
        note()
        before(*arguments)

    signal.signal(signal.SIGTERM, call_both)


def run_asyncio() -> None:
    async def work() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, note)
        await asyncio.sleep(0)

    asyncio.run(work())


TAKES: dict[str, Callable[[], object]] = {
    "a handler": lambda: signal.signal(signal.SIGTERM, note),
    "sys.exit": lambda: signal.signal(signal.SIGTERM, leave),
    "an error": lambda: signal.signal(signal.SIGTERM, fail),
    "KeyboardInterrupt": lambda: signal.signal(signal.SIGTERM, signal.default_int_handler),
    "the default": lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL),
    "ignored": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "no wakeup": lambda: signal.set_wakeup_fd(-1),
    "calls the one before": call_the_one_before,
    "asyncio": run_asyncio,
}


def taking(how: str) -> tuple[TensorDataset, TensorDataset]:
    """Points from code that takes SIGTERM."""
    TAKES[how]()
    return line(64), line(8)


class TakingLater(Waiting):
    """Takes SIGTERM in the fifth forward pass of training."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        if model.training and self.steps == 4:
            TAKES[self.how]()
        return super().forward(model, batch)


def slow(seconds: float = 1.0) -> tuple[TensorDataset, TensorDataset]:
    """Points that take long to load, with so many seconds from a signal to the end."""
    stopping.START_SECONDS = seconds
    stage.at("start")
    return line(64), line(8)


def short_silence() -> tuple[TensorDataset, TensorDataset]:
    """Points, with two seconds in which a rank may be silent once a stop is asked for."""
    verdicts.STOP_SECONDS = 2.0
    return line(64), line(8)


def sleep() -> None:
    time.sleep(200)


def last_words() -> None:
    time.sleep(1)
    Path(f"last-words-{os.environ.get('RANK', 0)}").touch()


def process(target: Callable[[], None]) -> multiprocessing.process.BaseProcess:
    return multiprocessing.get_context("fork").Process(target=target, name="server")


def end_at_exit() -> None:
    child = process(sleep)
    child.start()
    atexit.register(child.terminate)


def keep_manager() -> None:
    KEPT.append(multiprocessing.get_context("fork").Manager())


def keep_pool() -> None:
    pool = multiprocessing.get_context("fork").Pool(2)
    assert pool.map(abs, [-1, -2]) == [1, 2]
    KEPT.append(pool)


KEPT: list[Any] = []  # what a user's module keeps as long as the process lives

STARTS: dict[str, Callable[[], object]] = {
    "a thread that does not end": lambda: threading.Thread(target=sleep, name="uploader").start(),
    "a process that does not end": lambda: process(sleep).start(),
    "a thread with last words": lambda: threading.Thread(target=last_words).start(),
    "a process with last words": lambda: process(last_words).start(),
    "an executor": lambda: concurrent.futures.ThreadPoolExecutor(2).submit(last_words),
    "a process that an exit function ends": end_at_exit,
    "a manager": keep_manager,
    "a pool": keep_pool,
}


def outlived(what: str, seconds: float = 10.0) -> tuple[TensorDataset, TensorDataset]:
    """Points from code that starts a thread or process; the end waits so many seconds for it."""
    leaving.OTHERS_SECONDS = seconds
    STARTS[what]()
    return line(64), line(8)


def with_processes(how: str) -> tuple[TensorDataset, TensorDataset]:
    """Points that processes by fork load, which are then told to end while they are at work."""
    context = multiprocessing.get_context("fork")
    if how == "a pool":
        with context.Pool(2) as pool:
            assert pool.map(abs, [-1, -2]) == [1, 2]
            pool.map_async(time.sleep, [200, 200])
            time.sleep(0.3)  # they have begun; the end of the block ends them
    else:
        child = process(sleep)
        child.start()
        child.terminate()
        child.join()
        assert child.exitcode == -signal.SIGTERM
    return line(64), line(8)


class Forked:
    """A data set of samples that processes by fork load; they are started for the first sample, and kept."""

    def __init__(self, how: str, samples: int) -> None:
        self.how, self.points = how, line(samples)
        self.processes: Any = None

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> Any:
        context = multiprocessing.get_context("fork")
        if self.processes is None:
            executor = concurrent.futures.ProcessPoolExecutor
            self.processes = context.Pool(2) if self.how == "a pool" else executor(2, context)
        return next(iter(self.processes.map(self.points.__getitem__, [int(index)])))


def forked(how: str) -> tuple[Forked, Forked]:
    """Points that processes by fork load."""
    return Forked(how, 64), Forked(how, 8)


LEAVES: dict[str, Callable[[], object]] = {
    "sys.exit(0)": lambda: sys.exit(0),
    "SystemExit": lambda: (_ for _ in ()).throw(SystemExit),
    "KeyboardInterrupt": lambda: (_ for _ in ()).throw(KeyboardInterrupt),
    "os._exit(0)": lambda: os._exit(0),
}


class Leaving(Waiting):
    """Leaves in the fifth forward pass of training, on rank 0 or the one that is given."""

    def __init__(self, how: str, rank: int = 0) -> None:
        super().__init__()
        self.how, self.rank = how, rank

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        if model.training and self.steps == 4 and int(os.environ.get("RANK", 0)) == self.rank:
            LEAVES[self.how]()
        return super().forward(model, batch)

"""Where the time of an attempt goes: each second belongs to one account. Also samples per second."""

import resource
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# start_up: before the end of the first step (imports, loading, compiling, loader workers), and the end of the attempt.
# data: the loop waits for a batch. lost: steps that a later attempt did again (see accounts.py).
ACCOUNTS = ("start_up", "data", "compute", "validation", "checkpoint", "lost")
IN_ROWS = ACCOUNTS[1:-1]  # what a row of metrics.jsonl has


class Clock:
    """The accounts of this rank's attempt, in seconds, which add up to its wall time. It waits for the device before
    and after validation and saving only: the work queued before belongs to compute."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lock = threading.Lock()  # time.json is written by another thread
        self.seconds = dict.fromkeys(ACCOUNTS, 0.0)
        self.account, self.since = "start_up", time.perf_counter() - process_age()
        self.running = False  # True after the first step
        self.samples = self.steps = 0
        self.loop_began = self.since
        self.last_read = self.seconds.copy()

    def switch(self, account: str) -> None:
        """Count time to `account` from now on."""
        with self.lock:
            now = time.perf_counter()
            self.seconds[self.account] += now - self.since
            self.account, self.since = account, now

    @contextmanager
    def on(self, account: str) -> Iterator[None]:
        """Count the time of the block, on the host and on the device, to `account`."""
        before = self.account
        self._wait_for_device()
        self.switch(account)
        yield
        self._wait_for_device()
        self.switch(before)

    def waiting(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches; the time until each arrives counts to data."""
        self.loop_began = time.perf_counter()
        iterator = iter(batches)
        while True:
            if self.running:
                self.switch("data")
            try:
                batch = next(iterator)
            except StopIteration:
                return
            if self.running:
                self.switch("compute")
            yield batch

    def add(self, samples: int) -> None:
        """Count a step of so many samples, over all ranks."""
        self.steps += 1
        if self.steps == 1:  # it started workers and perhaps compiled: its samples count only until the second step
            self._wait_for_device()
            self.switch("compute")
            self.running = True
        elif self.steps == 2:
            self.samples = 0
        self.samples += samples

    def read(self) -> dict[str, float]:
        """For a train row, after the device's work: samples per second of data and compute, and the seconds of each
        account, both since the last call."""
        self.switch(self.account)
        seconds = {account: self.seconds[account] - self.last_read[account] for account in IN_ROWS}
        training = seconds["data"] + seconds["compute"]
        if self.steps == 1:
            training = time.perf_counter() - self.loop_began
        rate = self.samples / training if training else 0.0
        self.samples, self.last_read = 0, self.seconds.copy()
        return {"samples_per_second": rate, **{f"{account}_seconds": value for account, value in seconds.items()}}

    def totals(self) -> dict[str, float]:
        """Seconds of each account so far. Any thread may ask."""
        with self.lock:
            totals = self.seconds.copy()
            totals[self.account] += time.perf_counter() - self.since
        return totals

    def _wait_for_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def process_age() -> float:
    """Seconds since this process started; 0 where that cannot be read."""
    import psutil

    try:
        # Since boot: psutil knows the time of the boot to a second only, and the clock may be set meanwhile.
        started = psutil.Process().create_time() - psutil.boot_time()
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (psutil.Error, OSError, RuntimeError, AttributeError):  # AttributeError: no such clock on macOS
        return 0.0


def peak_memory(device: torch.device) -> float:
    """This rank's peak memory so far, in GiB: on its device, or on the CPU that of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":  # it keeps no peak
        return torch.mps.current_allocated_memory() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

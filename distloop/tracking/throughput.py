"""Samples per second of training, without validation, saving and start-up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Throughput:
    """Counts samples; the clock is read at logging steps only, right after the losses were waited for."""

    def __init__(self) -> None:
        self.samples, self.since = 0, time.perf_counter()

    def add(self, samples: int) -> None:
        self.samples += samples

    def read(self) -> float:
        """Samples per second, over all ranks, since the last reading."""
        now = time.perf_counter()
        rate = self.samples / (now - self.since)
        self.samples, self.since = 0, now
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count as time."""
        paused = time.perf_counter()
        yield
        self.since += time.perf_counter() - paused

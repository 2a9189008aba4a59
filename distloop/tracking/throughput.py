"""Samples per second of training, without validation, saving and start-up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Throughput:
    """Counts samples; the clock is read at logging steps only, right after the losses were waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.samples = self.steps = 0
        self.since = self.first_done = time.perf_counter()

    def add(self, samples: int) -> None:
        self.steps += 1
        if self.steps == 2:  # the first step, which started workers and perhaps compiled, counts only if it is alone
            self.samples, self.since = 0, self.first_done
        self.samples += samples
        if self.steps == 1:
            self.first_done = self._now()

    def read(self) -> float:
        """Samples per second, over all ranks, since the last reading."""
        now = time.perf_counter()
        rate = self.samples / (now - self.since)
        self.samples, self.since = 0, now
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count as time."""
        paused = self._now()
        yield
        self.since += self._now() - paused

    def _now(self) -> float:
        if self.device.type == "cuda":  # what has been queued belongs to what came before
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

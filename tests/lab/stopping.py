"""A data set and a task that wait at given places, so that a test knows where a run is when it is asked to stop.

A place is waited at while a file hold-PLACE lies in the working directory; at-PLACE-RANK says that a rank is there.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distloop.training.tasks import Regression

FIRST_HELD_STEP = 7  # further than the two forward passes with which DDP is warmed up


def wait_at(place: str) -> None:
    """Wait here while the test says so; if its file says "in C", as uninterruptibly as a collective does."""
    hold = Path(f"hold-{place}").absolute()
    if not hold.exists():
        return
    at = Path(f"at-{place}-{os.environ.get('RANK', 0)}").absolute()
    if hold.read_text() == "in C":
        wait_in_c(hold, at)
    at.touch()
    while hold.exists():
        time.sleep(0.01)


def wait_in_c(hold: Path, at: Path) -> None:
    """Wait for a mutex: no signal interrupts that, and no Python handler runs meanwhile, but other threads do."""
    library = ctypes.CDLL(None)
    mutex = ctypes.create_string_buffer(64)  # zeros are an open mutex
    library.pthread_mutex_lock(mutex)

    def let_go() -> None:
        sleeping = 0
        while sleeping < 10:  # the main thread is in there by now, not about to be
            time.sleep(0.01)
            state = Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[0]
            sleeping = sleeping + 1 if state == "S" else 0
        at.touch()
        while hold.exists():
            time.sleep(0.01)
        library.pthread_mutex_unlock(mutex)

    threading.Thread(target=let_go, daemon=True).start()
    library.pthread_mutex_lock(mutex)


class Waiting(Regression):
    """Regression that waits in a step, or in validation, and takes `seconds` for each."""

    def __init__(self, step_seconds: float = 0.01, validation_seconds: float = 0.0) -> None:
        self.step_seconds, self.validation_seconds = step_seconds, validation_seconds
        self.steps = 0

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        if model.training:
            self.steps += 1
            if self.steps >= FIRST_HELD_STEP:
                wait_at("step")
            wait_at("any-step")
            time.sleep(self.step_seconds)
        elif self.steps:  # before any, the task is introduced to the model
            wait_at("validation")
            time.sleep(self.validation_seconds)
        return super().forward(model, batch)


def points(
    own_group: bool = False, slow_disk: bool = False, slow_workers: bool = False, workers: str = "fork"
) -> tuple[TensorDataset, TensorDataset]:
    """64 points to train on and 8 to validate with; waits at "start".

    own_group: the process and what it starts become a process group, as one that a terminal or Slurm signals.
    slow_disk: a save waits at "save". slow_workers: a loader worker waits at "worker" before it is set up.
    workers: how loader workers are started: "fork" as by default on Linux (a rank from the forkserver would take that),
    or "forkserver" as beside a GPU.
    """
    if own_group:
        os.setpgid(0, 0)
    multiprocessing.set_start_method(workers, force=True)
    if slow_disk:
        sync = os.fsync

        def slow_sync(descriptor: int) -> None:
            if ".writing_step_" in os.readlink(f"/proc/self/fd/{descriptor}"):
                wait_at("save")
            sync(descriptor)

        os.fsync = slow_sync  # type: ignore[assignment]
    if slow_workers:
        set_threads = torch.set_num_threads  # a worker calls it once it has torch's signal handlers and not yet ours

        def slow_set_threads(count: int) -> None:
            if multiprocessing.current_process().daemon:
                wait_at("worker")
            set_threads(count)

        torch.set_num_threads = slow_set_threads  # type: ignore[assignment]
    wait_at("start")
    train, validation = torch.linspace(-1, 1, 64)[:, None], torch.linspace(-1, 1, 8)[:, None]
    return TensorDataset(train, 2 * train + 1), TensorDataset(validation, 2 * validation + 1)

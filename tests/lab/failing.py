"""A model, a data set and a task that fail on one rank, at a given place and in a given way.

Which, where and how stands in the environment, not in the config, so that the next start of the same run continues
it: FAIL="WHERE HOW RANK", as in "forward raise 1", or "all" for the rank. The files failing and failing-RANK say that
it is about to. With SLOW_SAVE the checkpoint before it is being written, and takes until some moments after.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset, get_worker_info

from distloop.errors import UsageError
from distloop.training.tasks import Regression

FAILING_STEP = 5
SAMPLES, GLOBAL_BATCH = 64, 16


class FailingTask(Regression):
    """Fails in the third loss, however it is started."""

    def __init__(self) -> None:
        self.calls = 0

    def loss(self, outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("the third step is too much")
        return super().loss(outputs, batch)


def fail_if_meant(where: str) -> None:
    """Fail, if this is the place and the rank."""
    place, how, rank = os.environ.get("FAIL", "nowhere never -1").split()
    own = os.environ.get("RANK", "0")
    if place == where and rank in (own, "all"):
        Path(f"failing-{own}").touch()
        Path("failing").touch()
        ways_to_fail(how)


def ways_to_fail(how: str) -> None:
    if how == "raise":
        raise ValueError("a value that nobody likes")
    if how == "reset":
        raise ConnectionResetError(104, "Connection reset by peer")
    if how == "runtime":
        raise RuntimeError("Connection closed by peer: the database of the user")
    if how == "collective":
        torch.distributed.barrier()  # one that the others do not call
    if how == "mistake":
        raise UsageError("tests.lab.failing: this is used wrongly; use it rightly.")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "os._exit":
        os._exit(0)
    if how == "sys.exit":
        sys.exit(0)
    if how == "segfault":
        ctypes.string_at(0)
    if how == "suspend":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "loop":
        while True:
            pass
    if how == "stall":  # of all ranks, which comes to an end
        time.sleep(float(os.environ["STALL"]))


class Failing(Regression):
    """Regression that fails in the forward pass of FAILING_STEP, or in the first validation after it."""

    def __init__(self) -> None:
        self.steps, self.validated = 0, False

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        if model.training:
            self.steps += 1
            if self.steps == FAILING_STEP + 2:  # DDP is warmed up with two
                Points.is_late = True
                fail_if_meant("forward")
        elif Points.is_late and not self.validated:
            self.validated = True
            fail_if_meant("validation")
        return super().forward(model, batch)


class Points(Dataset[tuple[Tensor, Tensor]]):
    """Points on a line. Fails after FAILING_STEP in the main process, after some samples in a loader worker."""

    is_late = False  # the task has come to FAILING_STEP

    def __init__(self) -> None:
        inputs = torch.linspace(-1, 1, SAMPLES)[:, None]
        self.points = TensorDataset(inputs, 2 * inputs + 1)
        self.served = 0

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if get_worker_info() is not None:
            self.served += 1
            if self.served == GLOBAL_BATCH:  # some steps' samples of one of several workers
                fail_if_meant("worker")
        elif Points.is_late:
            fail_if_meant("data")
        return self.points[index]


def save_slowly() -> None:
    """The save of the step before FAILING_STEP has begun when that fails, and lasts a while longer."""
    sync = os.fsync

    def slow_sync(descriptor: int) -> None:
        if f".writing_step_{FAILING_STEP - 1:08d}" in os.readlink(f"/proc/self/fd/{descriptor}"):
            Path("saving").touch()
            while not Path("failing").exists():
                time.sleep(0.01)
            time.sleep(0.5)
        sync(descriptor)

    os.fsync = slow_sync  # type: ignore[assignment]


def points() -> tuple[Points, TensorDataset]:
    if "SLOW_SAVE" in os.environ:
        save_slowly()
    inputs = torch.linspace(-1, 1, 8)[:, None]
    return Points(), TensorDataset(inputs, 2 * inputs + 1)


def linear(inputs: int = 1, outputs: int = 1) -> nn.Module:
    fail_if_meant("model")
    return nn.Linear(inputs, outputs)

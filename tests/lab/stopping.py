"""A data set and a task that come to places, so that a test knows where a run is when it is asked to stop."""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distloop.tasks import Regression
from tests.lab import stage
from tests.lab.points import line

FIRST_HELD_STEP = 7
REHEARSED = 1 if int(os.environ.get("WORLD_SIZE", 1)) == 1 else 2  # forward passes of training before the first step


class Waiting(Regression):
    """Regression that comes to "step" and "validation", and takes some seconds for each.

    "step" is FIRST_HELD_STEP and each later one, "any-step" is each forward pass in training, of the rehearsal too.
    """

    def __init__(self, step_seconds: float = 0.01, validation_seconds: float = 0.0) -> None:
        self.step_seconds, self.validation_seconds = step_seconds, validation_seconds

    passes = 0  # of the class, which the rehearsal does not put back

    @property
    def steps(self) -> int:
        """How many forward passes of training were done or begun, without those of the rehearsal."""
        return max(0, Waiting.passes - REHEARSED)

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        if model.training:
            Waiting.passes += 1
            if self.steps >= FIRST_HELD_STEP:
                stage.at("step")
            stage.at("any-step")
            time.sleep(self.step_seconds)
        elif self.steps:  # before any, the task is introduced to the model
            stage.at("validation")
            time.sleep(self.validation_seconds)
        return super().forward(model, batch)


def stage_saves() -> None:
    """Let each save come to "save", with its step, before its first file is on the disk."""
    sync = os.fsync

    def staged_sync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if step := re.search(r"\.writing_step_(\d+)", path):
            stage.at("save", int(step[1]))
        sync(descriptor)

    os.fsync = staged_sync  # type: ignore[assignment]


def points(
    own_group: bool = False, slow_disk: bool = False, slow_workers: bool = False, workers: str = "fork"
) -> tuple[TensorDataset, TensorDataset]:
    """64 points to train on and 8 to validate with; comes to "start".

    own_group: the process and what it starts become a process group, as one that a terminal or Slurm signals.
    slow_disk: a save comes to "save". slow_workers: a loader worker comes to "worker" before it is set up.
    workers: how loader workers are started: "fork" as by default on Linux (a rank from the forkserver would take that),
    or "forkserver" as beside a GPU.
    """
    if own_group:
        os.setpgid(0, 0)
    multiprocessing.set_start_method(workers, force=True)
    if slow_disk:
        stage_saves()
    if slow_workers:
        set_threads = torch.set_num_threads  # a worker calls it once it has torch's signal handlers and not yet ours

        def slow_set_threads(count: int) -> None:
            if sys._getframe(1).f_locals.get("num_workers") == 2:  # one worker alone looks at some samples before
                stage.at("worker")
            set_threads(count)

        torch.set_num_threads = slow_set_threads  # type: ignore[assignment]
    stage.at("start")
    return line(64), line(8)

"""A data set, a model and a task that take known times, and write down which account each belongs to.

They sleep as $SLEEP says, JSON: seconds for each batch ("data"), for each forward pass in training ("compute"), for
each batch of a validation ("validation"), for each checkpoint ("checkpoint") and for building the model ("start_up").
That is not among the arguments, since a run keeps those. What was slept is in the file "slept", one JSON row for each
time. Each step comes to the place "step".
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate, get_worker_info

from distloop.tasks import Regression
from tests.lab import stage
from tests.lab.points import line

SAMPLES, BATCH = 64, 4
steps = 0  # that this process has begun


def sleep(account: str) -> None:
    """Take the time that is meant for `account`, on rank 0, whose clock counts."""
    if int(os.environ.get("RANK", 0)):
        return
    begun = time.perf_counter()
    time.sleep(json.loads(os.environ.get("SLEEP", "{}")).get(account, 0.0))
    # Before the end of the first step all of it is start-up: the loop loads its first two batches before it.
    first = steps <= (account != "data")
    row = {"account": "start_up" if first else account, "seconds": time.perf_counter() - begun, "step": steps}
    if get_worker_info() is None:  # what a worker sleeps is nobody's time: the loop may have enough to do meanwhile
        with open("slept", "a") as file:
            file.write(json.dumps(row) + "\n")


def slept(folder: Path, after_step: int = -1) -> dict[str, float]:
    """The seconds of each account that were slept in steps after this one."""
    sums: dict[str, float] = {}
    for row in map(json.loads, (folder / "slept").read_text().splitlines()):
        if row["step"] > after_step:
            sums[row["account"]] = sums.get(row["account"], 0.0) + row["seconds"]
    return sums


def points() -> tuple[TensorDataset, TensorDataset]:
    """Points on a line, those to validate with to the right of the others."""
    return line(SAMPLES), line(2 * BATCH, 2, 3)


def collate(samples: list[Any]) -> Any:
    """A batch, which takes its time; one of a validation takes it in the forward pass."""
    if samples[0][0] < 1.5:
        sleep("data")
    return default_collate(samples)


class Model(nn.Linear):
    """y = a x + b, slow to build and to save."""

    def __init__(self) -> None:
        sleep("start_up")
        super().__init__(1, 1)

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        if steps:
            sleep("checkpoint")
        return super().state_dict(*arguments, **options)


class Task(Regression):
    """Regression, slow to compute and to validate."""

    # The rehearsal has one forward pass of training, or two on several ranks. Of the class: it does not put that back.
    passes = -1 if int(os.environ.get("WORLD_SIZE", 1)) == 1 else -2

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        global steps
        if model.training:
            Task.passes += 1
            steps = max(0, Task.passes)
            if steps:
                sleep("compute")
                stage.at("step", steps)
        elif steps:  # before any, the task is introduced to the model
            sleep("validation")
        return super().forward(model, batch)

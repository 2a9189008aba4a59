"""A model, a data set and a task that come to places where a test lets a rank fail: model, data, worker, forward, …"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset, get_worker_info

from distloop.tasks import Regression
from tests.lab import stage
from tests.lab.points import line
from tests.lab.stopping import stage_saves

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


class Failing(Regression):
    """Regression that comes to "forward" in FAILING_STEP, and to "validation" after it."""

    def __init__(self) -> None:
        self.steps = 0

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        if model.training:
            self.steps += 1
            if self.steps == FAILING_STEP:  # the rehearsal puts the count back
                Points.is_late = True
                stage.at("forward")
        elif Points.is_late:
            stage.at("validation")
        return super().forward(model, batch)

    def summary(self, sums: dict[str, Tensor]) -> dict[str, float]:
        if Points.is_late:
            stage.at("summary")
        return super().summary(sums)


class Points(Dataset[tuple[Tensor, Tensor]]):
    """Points on a line. Comes to "data" after FAILING_STEP, and to "worker" after some samples in a loader worker."""

    is_late = False  # the task has come to FAILING_STEP

    def __init__(self) -> None:
        self.points = line(SAMPLES)
        self.served = 0

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if get_worker_info() is not None:
            self.served += 1
            if self.served == GLOBAL_BATCH + 1:  # in training: ranks have loaded fewer before it, to compare them
                stage.at("worker")
        elif Points.is_late:
            stage.at("data")
        return self.points[index]


def points() -> tuple[Points, TensorDataset]:
    stage_saves()
    return Points(), line(8)


def linear(inputs: int = 1, outputs: int = 1) -> nn.Module:
    stage.at("model")
    return nn.Linear(inputs, outputs)

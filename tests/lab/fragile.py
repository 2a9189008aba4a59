"""A task that comes to places where a test lets a validation fail, and a model with BatchNorm."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import TensorDataset

from distloop.tasks import Regression
from tests.lab import stage
from tests.lab.points import line
from tests.lab.stopping import stage_saves

SUMMARIES: list[int] = []  # global: what a task counts is put back after the rehearsal, which has the first one


class Fragile(Regression):
    """Comes to "forward", "metrics" and "summary" in validation, with the number of this attempt's updates so far."""

    def __init__(self) -> None:
        self.updates = 0
        register_optimizer_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.updates += 1

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        if not model.training:
            stage.at("forward", self.updates)
        return super().forward(model, batch)

    def metrics(self, outputs: Tensor, batch: Any) -> dict[str, Tensor]:
        stage.at("before metrics", self.updates)
        stage.at("metrics", self.updates)
        return super().metrics(outputs, batch)

    def summary(self, sums: dict[str, Tensor]) -> dict[str, float]:
        if SUMMARIES:
            stage.at("summary", self.updates)
        SUMMARIES.append(self.updates)
        return super().summary(sums)


def normalised() -> nn.Module:
    """Its statistics differ between ranks."""
    return nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def points() -> tuple[TensorDataset, TensorDataset]:
    stage_saves()
    return line(64), line(8)

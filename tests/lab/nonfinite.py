"""Data and tasks with a number that is none, at a place that a test knows."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distloop.data.datasets import DataSource
from distloop.tasks import Classification
from tests.lab.resuming import Indexed, StopsItself

SAMPLES, FEATURES, CLASSES = 96, 6, 3
VALUES = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "none": 0.5}


def points(bad: tuple[int, ...] | list[int] = (), value: str = "nan") -> DataSource:
    """96 points of three classes; one number of each of the `bad` samples is `value`."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(SAMPLES, FEATURES, generator=generator, dtype=torch.float64)
    targets = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    validation = Indexed(inputs[:16].clone(), targets[:16])
    inputs[list(bad), 1] = VALUES[value]
    return DataSource(Indexed(inputs, targets), validation, classes=("a", "b", "c"))


def network(num_classes: int) -> nn.Module:
    # No bias before BatchNorm: its gradient would be nothing but rounding, which Adam makes large.
    return nn.Sequential(nn.Linear(FEATURES, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, num_classes))


class Watched(StopsItself, Classification):
    """Writes a digest of the parameters, as each rank has them, for each micro-batch that it trains on. $TEST_SLOW: the
    seconds that each takes at least, so that the ranks agree to stop within a step or two."""

    def __init__(self, folder: str = "", loss_of: tuple[int, ...] | list[int] = (), how: str = "nan") -> None:
        """`loss_of`: samples whose loss, or (how = "backward") only its gradient, is not finite."""
        super().__init__()
        self.folder, self.loss_of, self.how = folder, torch.tensor(list(loss_of), dtype=torch.int64), how

    def forward(self, model: nn.Module, batch: Any) -> Any:
        time.sleep(float(os.environ.get("TEST_SLOW", 0)))
        if self.folder and model.training:
            digest = hashlib.sha256()
            for parameter in model.parameters():
                digest.update(parameter.detach().numpy().tobytes())
            with open(Path(self.folder) / os.environ.get("RANK", "0"), "a") as file:
                file.write(digest.hexdigest() + "\n")
        return super().forward(model, batch)

    def loss(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Any]:
        loss, weight = super().loss(outputs, batch)
        if torch.is_grad_enabled() and len(self.loss_of):
            meant = torch.isin(batch[2], self.loss_of)
            if self.how == "backward":  # the root of zero is zero, its slope is not a number
                loss = loss + torch.where(meant, outputs[:, 0] * 0, 1.0).sqrt().sum()
            else:
                loss = loss + (outputs[meant, 0] * VALUES[self.how]).sum()
        return loss, weight


class WatchedTokens(Watched):
    """The same with a weight that is known only when the batch is: two, or one for each sample of class 0."""

    weight = "tokens"

    def loss(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Any]:
        weights = 2.0 - (batch[1] == 0).double()
        losses = nn.functional.cross_entropy(outputs, batch[1], reduction="none")
        return (losses * weights).sum(), weights.sum()

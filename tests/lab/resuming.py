"""What the tests of stopping and continuing train; and tasks that may be stopped in the middle of a step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from distloop.data.datasets import DataSource, digits
from distloop.data.whole_batches import InMemory
from distloop.tasks import Classification, LanguageModelling, Regression
from distloop.training.models import cnn
from tests.lab import stage
from tests.lab.user_code import NextLetter, digest


class StopsItself:
    """Before a task: comes to the place "loss" in each training loss; its count is that of this attempt's losses."""

    calls = 0

    def loss(self, outputs: Any, batch: Any) -> Any:
        if torch.is_grad_enabled():
            self.calls += 1
            stage.at("loss", self.calls)
        return super().loss(outputs, batch)  # type: ignore[misc]


class StoppedClassification(StopsItself, Classification):
    pass


class StoppedRegression(StopsItself, Regression):
    pass


class StoppedLanguageModelling(StopsItself, LanguageModelling):
    pass


class StoppedNextLetter(StopsItself, NextLetter):
    pass


class RecordedClassification(StoppedClassification):
    """Writes a line for each micro-batch that is trained on, into a file of this rank and attempt: index and digest
    of the input of each sample, which indexed_digits put into the batch."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def loss(self, outputs: Any, batch: Any) -> Any:
        if torch.is_grad_enabled():
            name = f"{os.environ['TEST_ATTEMPT']}-{os.environ.get('RANK', '0')}"
            with open(Path(self.folder) / name, "a") as file:
                words = (f"{index}:{digest(row)}" for index, row in zip(batch[2].tolist(), batch[0], strict=True))
                file.write(" ".join(words) + "\n")
        return super().loss(outputs, batch)


class Indexed(InMemory):
    """Batches of (inputs, targets, indices)."""

    def batch(self, indices: NDArray[np.int64], random: NDArray[np.float64]) -> Any:
        return *super().batch(indices, random), torch.from_numpy(indices)


def indexed_digits() -> DataSource:
    """digits() with the indices of the samples as the third part of a batch."""
    source = digits()
    train, validation = (Indexed(half.inputs, half.targets, half.pad) for half in (source.train, source.validation))
    return DataSource(train, validation, source.classes, source.mean, source.std)


def channels_last(input_shape: tuple[int, int, int], num_outputs: int, norm: str = "batch") -> nn.Module:
    """The package's cnn with its parameters in channels_last."""
    return cnn(input_shape, num_outputs, width=8, norm=norm).to(memory_format=torch.channels_last)


class Centred(nn.Module):
    """A linear model of inputs less their running mean: a buffer on which training depends. Each rank has its own."""

    mean: torch.Tensor

    def __init__(self, input_shape: tuple[int, ...], num_outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_shape[0], num_outputs)
        self.register_buffer("mean", torch.zeros(input_shape))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean.lerp_(inputs.mean(0), 0.1)
        return self.linear(inputs - self.mean)


def stored_points(file: str) -> DataSource:
    """Inputs and targets from a file, which may change while its name does not."""
    inputs, targets = torch.load(file, weights_only=True)
    return DataSource(InMemory(inputs, targets), InMemory(inputs[:8], targets[:8]))


def store_points(file: Path, seed: int, samples: int = 16) -> None:
    generator = torch.Generator().manual_seed(seed)
    torch.save(tuple(torch.randn(samples, size, generator=generator) for size in (3, 1)), file)


def halving(step: int, total_steps: int) -> float:
    """A schedule: the share of the peak rate."""
    return 0.5 ** (step // 8)


class Signs(torch.optim.Optimizer):
    """Adds the sign of a moving average of the gradient (Chen et al. 2023, "Lion", simplified)."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's may return a closure's loss
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                moment = self.state[parameter].setdefault("moment", torch.zeros_like(parameter))
                moment.mul_(group["beta"]).add_(parameter.grad)
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(moment.tanh(), alpha=group["lr"])

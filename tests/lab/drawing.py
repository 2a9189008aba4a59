"""User code that draws from the global generators of random, numpy and torch, in the places that `draws` names.

$DRAWN_BEFORE is how many numbers are drawn as the data are built, before anything that matters.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import default_collate

from distloop.data.whole_batches import InMemory, WholeBatches
from distloop.tasks import Task, targets_of

ROWS, VALIDATED, CLASSES = 96, 21, 3


def drawn() -> float:
    """A number in [0, 1) that depends on each of the three generators."""
    return (random.random() + float(np.random.random()) + float(torch.rand(()))) % 1.0


AS_IMPORTED = drawn()


class Rows:
    """Rows of four numbers and a class. `order`: which rows."""

    def __init__(self, order: NDArray[np.int64], factor: float = 1.0) -> None:
        numbers = np.random.RandomState(0).randn(ROWS + VALIDATED, 4)  # the same rows in each process
        self.inputs = torch.tensor(factor * numbers[order], dtype=torch.float64)
        self.labels = torch.from_numpy(order % CLASSES)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.labels[index]


class Batches(Rows, WholeBatches):
    """Gives whole batches, of which each is scaled by a number that it draws."""

    draws = 0

    def batch(self, indices: NDArray[np.int64], numbers: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        return self.inputs[indices] * (0.5 + drawn()), self.labels[indices]


class Scaled(Rows):
    """Each row is scaled by the number that this process drew when it imported the module."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index] * (0.5 + AS_IMPORTED), self.labels[index]


def make_data(draws: Sequence[str] = ()) -> tuple[Any, Rows]:
    for _ in range(int(os.environ.get("DRAWN_BEFORE", 0))):
        drawn()
    order = np.arange(ROWS + VALIDATED)
    if "data" in draws:
        shuffled = order.tolist()
        random.shuffle(shuffled)
        order = np.array(shuffled)[np.random.permutation(len(order))][torch.randperm(len(order)).numpy()]
    if "import" in draws:
        multiprocessing.set_start_method("forkserver", force=True)  # as on CUDA: workers import this module anew
    if "memory" in draws:
        rows = Rows(order)
        return InMemory(rows.inputs[:ROWS], rows.labels[:ROWS]), Rows(order[ROWS:])
    kind = Batches if "batch" in draws else Scaled if "import" in draws else Rows
    return kind(order[:ROWS]), Rows(order[ROWS:])


def collate(samples: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    inputs, labels = default_collate(samples)
    return [inputs * (0.5 + drawn()), labels]


def data_of_a_set() -> tuple[Rows, Rows]:
    """The classes are numbered in the order of a set of texts, and the order is written down."""
    names = list({f"word {number}" for number in range(30)})
    note("names", ",".join(names).replace(" ", "-"))
    order = np.arange(ROWS + VALIDATED)
    halves = Rows(order[:ROWS]), Rows(order[ROWS:])
    for half in halves:
        half.labels = torch.tensor([names.index(f"word {row % 30}") % CLASSES for row in range(len(half))])
    return halves


class Net(nn.Module):
    """`draws`: "model": it keeps a number outside of its state; "update": each update of the optimizer gets noise."""

    def __init__(self, draws: Sequence[str] = ()) -> None:
        super().__init__()
        self.layer = nn.Linear(4, CLASSES)
        self.scale = 0.5 + drawn() if "model" in draws else 1.0
        if "update" in draws:
            register_optimizer_step_pre_hook(add_noise)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) * self.scale


def add_noise(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Noise on the gradient, as in differential privacy. Each rank writes down what it has added."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            noise = 0.1 * drawn() + 0.1 * torch.randn_like(parameter)
            parameter.grad += noise
            note("update", hashlib.sha256(noise.numpy().tobytes()).hexdigest()[:8])


class Guess(Task):
    def __init__(self, draws: Sequence[str] = ()) -> None:
        self.draws = draws
        self.scale = 0.5 + drawn() if "task" in draws else 1.0

    def factor(self, place: str) -> float:
        return 0.5 + drawn() if place in self.draws else self.scale

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0] * self.factor("forward"))

    def loss(self, outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
        loss = functional.cross_entropy(outputs, targets_of(batch), reduction="sum")
        return loss * self.factor("loss"), len(outputs)

    def metrics(self, outputs: Tensor, batch: Any) -> dict[str, Tensor]:
        return {"drawn": torch.tensor(self.factor("metrics") * len(outputs), dtype=torch.float64)}

    def summary(self, sums: dict[str, Tensor]) -> dict[str, float]:
        numbers = {"drawn": float(sums["drawn"]), "interval": self.factor("summary")}
        note("summary", f"{numbers['interval']:.9f}")
        return {**super().summary(sums), **numbers}


def note(name: str, text: str) -> None:
    """Add a line to this rank's notes."""
    if "NOTES" in os.environ:
        with open(Path(os.environ["NOTES"]) / f"{name}-{os.environ.get('RANK', 0)}", "a") as file:
            file.write(f"{text}\n")

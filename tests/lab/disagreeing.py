"""Data, models and tasks that are others on rank 1 than on rank 0; `differs` says in what."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import distloop
from distloop.data.datasets import DataSource
from distloop.tasks import Classification

SAMPLES, CLASSES = 96, ("cat", "dog", "bird")


def is_other(differs: str, what: str) -> bool:
    return os.environ.get("RANK") == "1" and differs == what


class Rows:
    """Four numbers and a label, as `form` brings them together; `draw` changes the numbers of each sample."""

    def __init__(self, samples: int, form: Callable[[Tensor, int], Any], draw: Callable[[], Tensor | float]) -> None:
        self.rows = torch.randn(samples, 4, generator=torch.Generator().manual_seed(0))
        self.form, self.draw = form, draw

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.form(self.rows[index] + self.draw(), index % len(CLASSES))


def make_data(differs: str = "", on_all: bool = False) -> DataSource:
    """`differs` on rank 1; with `on_all` on rank 0 as well."""

    def here(what: str) -> bool:
        return is_other(differs, what) or (on_all and differs == what)

    change_the_process(here)
    rows = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(SAMPLES) % len(CLASSES)
    validation = TensorDataset(rows[:20], labels[:20])
    if here("fewer samples"):
        rows, labels = rows[:80], labels[:80]
    if here("order"):
        rows, labels = rows.flip(0), labels.flip(0)
    if here("one column"):
        rows = rows[:, :3]
    if here("one sample"):
        rows[40] += 1
    if here("contents"):
        rows = rows + 1
    if here("validation"):
        validation = TensorDataset(rows[20:40], labels[20:40])
    train: Any = TensorDataset(rows, labels)
    if here("last file"):
        train = LastMissing(rows, labels)
    if differs == "own generator":
        train = Rows(SAMPLES, lambda row, label: (row, label), lambda: np.random.default_rng().normal())
    classes = tuple(reversed(CLASSES)) if here("class names") else CLASSES
    return DataSource(train, validation, classes)


class LastMissing(TensorDataset):
    """The file of the last sample is not there."""

    def __getitem__(self, index: int) -> Any:
        if index == len(self) - 1:
            raise FileNotFoundError("[Errno 2] No such file or directory: '/data/95.png'")
        return super().__getitem__(index)


def change_the_process(here: Callable[[str], bool]) -> None:
    """What imported code may set on one machine: versions stand for another installation."""
    if here("torch"):
        torch.__version__ = torch.torch_version.TorchVersion("2.0.0")
    if here("distloop"):
        distloop.__version__ = "0.0.9"
    if here("Python"):
        platform.python_version = lambda: "3.10.1"
    if here("threads"):
        torch.set_num_threads(2)
    if here("TF32"):
        torch.backends.cudnn.allow_tf32 = False
    if here("autocast"):
        torch.set_autocast_enabled("cpu", True)
    if here("default dtype"):
        torch.set_default_dtype(torch.float64)


def make_model(differs: str = "", number: float = 0.0) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, len(CLASSES))]
    if is_other(differs, "one layer more"):
        layers.append(nn.Linear(len(CLASSES), len(CLASSES)))
    if is_other(differs, "width"):
        layers[0], layers[1], layers[3] = nn.Linear(4, 9), nn.BatchNorm1d(9), nn.Linear(9, len(CLASSES))
    model: Any = nn.Sequential(*layers)
    if differs == "scratch":  # what a forward pass fills, and no checkpoint holds
        model.register_buffer("scratch", torch.tensor(float(os.environ.get("RANK", 0))), persistent=False)
    if differs == "order of layers":
        model = Two("ba" if is_other(differs, differs) else "ab")
    if is_other(differs, "initial values"):
        with torch.no_grad():
            model[3].weight.normal_(generator=torch.Generator().manual_seed(5))
    if is_other(differs, "buffer"):
        model[1].running_mean.fill_(0.5)
    if is_other(differs, "frozen"):
        model[0].bias.requires_grad_(False)
    return model


class Two(nn.Module):
    """Two equal layers, a and b, which are made in this order."""

    a: nn.Linear
    b: nn.Linear

    def __init__(self, order: str) -> None:
        super().__init__()
        for name in order:
            layer = nn.Linear(4, len(CLASSES))
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
            setattr(self, name, layer)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.a(inputs) + 2 * self.b(inputs)


class Task(Classification):
    def __init__(self, differs: str = "") -> None:
        super().__init__()
        if is_other(differs, "weight"):
            self.weight = "tokens"  # type: ignore[misc]
        if is_other(differs, "best"):
            self.best = ("loss", "min")  # type: ignore[misc,assignment]


def nested(row: Tensor, label: int) -> dict[str, Any]:
    """A sample of many kinds of values."""
    return {"inputs": row, "targets": label, "more": [np.float32(label), np.full((2, 2), label), ("text", 1.5, True)]}


def augmented() -> tuple[Any, Any]:
    """Samples whose noise is drawn from the global generators, which are seeded for each."""
    train = Rows(SAMPLES, nested, lambda: float(np.random.normal()) + torch.randn(4))
    return train, Rows(20, nested, lambda: 0.0)

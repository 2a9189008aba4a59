"""Collates that keep, drop, double or pad samples, and losses that return their weight in many forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import TensorDataset, default_collate

import distloop.tasks

SAMPLES, CLASSES = 64, 3


def make_data(samples: int = SAMPLES, alike: bool = False) -> tuple[TensorDataset, TensorDataset]:
    """`alike`: the mean gradient is the same over any of the samples."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.ones(samples, 4) if alike else torch.randn(samples, 4, generator=generator)
    labels = torch.zeros(samples, dtype=torch.long) if alike else torch.arange(samples) % CLASSES
    data = TensorDataset(inputs, labels)
    return data, data


def doubling(samples: list[Any]) -> Any:
    return default_collate([sample for sample in samples for _ in range(2)])


def dropping(samples: list[Any]) -> Any:
    return default_collate(samples[: -(-3 * len(samples) // 4)])


def padding(samples: list[Any]) -> Any:
    """To a multiple of 7 samples."""
    return default_collate([*samples, *samples[:1] * (-len(samples) % 7)])


def doubling_many(samples: list[Any]) -> Any:
    """As data that are broken far behind the first sample."""
    return doubling(samples) if len(samples) >= 16 else default_collate(samples)


def dropping_many(samples: list[Any]) -> Any:
    return dropping(samples) if len(samples) >= 16 else default_collate(samples)


def padding_many(samples: list[Any]) -> Any:
    return padding(samples) if len(samples) >= 16 else default_collate(samples)


def dropping_in_validation(samples: list[Any]) -> Any:
    return dropping(samples) if len(samples) > 16 else default_collate(samples)


FORMS: dict[str, Any] = {
    "int": int,
    "float": float,
    "tensor": torch.tensor,
    "float tensor": lambda number: torch.tensor(float(number)),
    "numpy": np.int64,
    "numpy float": np.float32,
    "none": lambda number: None,
    "nan": lambda number: float("nan"),
    "nan tensor": lambda number: torch.tensor(float("nan")),
    "negative": lambda number: -number,
    "negative tensor": lambda number: torch.tensor(-number),
    "for each": lambda number: torch.ones(number),
    "one": lambda number: 1,
    "text": str,
}


class Weighing(distloop.tasks.Classification):
    """Classification whose weight is the number of labels in one of FORMS."""

    def __init__(self, form: str = "int", only_loss: bool = False, mean: bool = False) -> None:
        super().__init__()
        self.form, self.only_loss, self.reduction = form, only_loss, "mean" if mean else "sum"

    def loss(self, outputs: Tensor, batch: Any) -> Any:
        loss = functional.cross_entropy(outputs, batch[1], reduction=self.reduction)
        return loss if self.only_loss else (loss, FORMS[self.form](len(batch[1])))


class Views(Weighing):
    """It counts what the batch holds."""

    weight = "views"


class Numbered(Weighing):
    weight = 3  # type: ignore[assignment]

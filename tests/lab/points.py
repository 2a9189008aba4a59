"""The smallest data set: points on the line y = 2 x + 1, as plain tensors."""

from __future__ import annotations

import torch
from torch.utils.data import TensorDataset


def line(samples: int, low: float = -1, high: float = 1) -> TensorDataset:
    """So many points, at equal distances from x = `low` to `high`; inputs and targets are [samples, 1]."""
    inputs = torch.linspace(low, high, samples)[:, None]
    return TensorDataset(inputs, 2 * inputs + 1)


def points(samples: int = 16) -> tuple[TensorDataset, TensorDataset]:
    """The same points to train on and to validate with."""
    return line(samples), line(samples)

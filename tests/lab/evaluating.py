"""A model with BatchNorm and dropout, whose validation depends on its buffers; and data that a run did not see."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import TensorDataset

from distloop.data import DataSource


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(8 * 36, 10)
        )


def noise() -> DataSource:
    """100 pictures of noise, in ten classes."""
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(100, 1, 8, 8, generator=generator), torch.arange(100) % 10)
    return DataSource(data, data, classes=[str(digit) for digit in range(10)])

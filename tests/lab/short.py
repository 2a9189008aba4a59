"""Data sets that end before their length, or change it; a collate and a loader that leave batches out."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from distloop.data.whole_batches import WholeBatches

SAMPLES = 64


class Rows(Dataset):
    """It says that it has SAMPLES samples, and has `there`."""

    def __init__(self, there: int = SAMPLES, how: str = "index", says: int = SAMPLES) -> None:
        self.rows, self.how, self.says = torch.randn(there, 4, generator=torch.Generator().manual_seed(0)), how, says

    def __len__(self) -> int:
        return self.says

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.how == "stop" and index >= len(self.rows):
            next(iter(()))
        return self.rows[index], index % 3


class Memory(WholeBatches, Rows):
    """Whole batches, with fewer rows than were asked for where the data are at their end."""

    draws = 0

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return super().__getitem__(index % len(self.rows))

    def batch(self, indices: Any, random: Any) -> tuple[Tensor, Tensor]:
        inside = torch.from_numpy(indices[indices < len(self.rows)])
        return self.rows[inside], inside % 3


class Shrinking(Rows):
    """It is shorter once samples were loaded: a step's for training, a batch's for validation."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded = 0

    def __len__(self) -> int:
        return SAMPLES if self.loaded < SAMPLES // 2 else SAMPLES // 2

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.loaded += 1
        return super().__getitem__(index)


def make_data(half: str, how: str = "index", there: int = SAMPLES - 1) -> tuple[Any, Any]:
    kind = Memory if how == "batch" else Rows
    short, whole = kind(there, how), kind(SAMPLES, how)
    return (short, whole) if half == "train" else (whole, short)


def shrinking(half: str) -> tuple[Any, Any]:
    return (Shrinking(), Rows()) if half == "train" else (Rows(), Shrinking())


def ends_in_validation(samples: list[Any]) -> Any:
    """A StopIteration that ends an iteration without a word."""
    return next(iter(())) if len(samples) > 16 else default_collate(samples)


def on_rank_1(there: int = SAMPLES - 20) -> tuple[Any, Any]:
    return Rows(there if os.environ.get("RANK") == "1" else SAMPLES), Rows()


class Hole(Rows):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return super().__getitem__(index if index != 30 else [][index])


def with_a_hole(half: str) -> tuple[Any, Any]:
    return (Hole(), Rows()) if half == "train" else (Rows(), Hole())

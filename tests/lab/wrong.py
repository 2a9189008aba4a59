"""Data sets, models and tasks as a user might get them wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from distloop.data.datasets import DataSource
from distloop.data.whole_batches import InMemory

SAMPLES, CLASSES, WRONG_LABEL = 64, 3, 7
NAMES = tuple(str(number) for number in range(CLASSES))


class Rows(Dataset):
    """Four numbers and a label per sample; the sample `wrong` has a label of no class."""

    def __init__(self, samples: int = SAMPLES, wrong: int | None = None) -> None:
        self.inputs = torch.randn(samples, 4, generator=torch.Generator().manual_seed(0))
        self.labels = torch.arange(samples) % CLASSES
        if wrong is not None:
            self.labels[wrong] = WRONG_LABEL

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.inputs[index], int(self.labels[index])


def wrong_label_in_memory(wrong: int) -> DataSource:
    """All labels are at hand before training, as in torchvision's data sets."""
    train, validation = Rows(wrong=wrong), Rows()
    return DataSource(InMemory(train.inputs, train.labels), InMemory(validation.inputs, validation.labels), NAMES)


def wrong_label(wrong: int) -> DataSource:
    """The labels are met one by one, in the loader."""
    return DataSource(Rows(wrong=wrong), Rows(), NAMES)


def wrong_label_in_validation(wrong: int) -> DataSource:
    return DataSource(Rows(), Rows(wrong=wrong), NAMES)


def rows(train: int = SAMPLES, validation: int = SAMPLES) -> DataSource:
    """Nothing wrong but, as the test asks, the number of samples."""
    return DataSource(Rows(train), Rows(validation), NAMES)


def stream() -> tuple[Any, Any]:
    """An iterator has no length and cannot be asked for a sample."""
    return iter([1, 2, 3]), Rows()


def a_list(*_: Any) -> list[int]:
    """Neither a data set, nor a model, nor a task."""
    return [1, 2, 3]


def three_outputs_in_a_row() -> nn.Module:
    """A model whose outputs have one dimension too many for classification."""
    return nn.Sequential(nn.Linear(4, CLASSES), nn.Unflatten(1, (CLASSES, 1)))

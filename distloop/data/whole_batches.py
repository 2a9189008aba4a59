"""Data sets that are asked for whole batches, and those that are in memory."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distloop.data.augment import DRAWS, is_plain, shift_and_flip

TOGETHER_BYTES, MOST_TOGETHER = 2**19, 64  # more would not stay in a core's cache


class WholeBatches:
    """Base class of a data set from which whole batches are taken by one call of batch(), not sample by sample."""

    draws: int = 0
    """How many random numbers batch() gets for each sample."""

    def batch(self, indices: NDArray[np.int64], random: NDArray[np.float64]) -> Any:
        """The batch of the samples at `indices`. `random`: numbers in [0, 1) to augment with, [len(indices), draws]; a
        sample's are the same in any batch, process and start."""
        raise NotImplementedError(f"{type(self).__name__} must define batch(indices, random).")


class InMemory(WholeBatches):
    """Inputs and targets as two tensors, [samples, …] each, from which whole batches are taken at once. Images
    [samples, channels, height, width] are shifted by up to `pad` pixels and, if `flip`, mirrored. A subclass that
    defines how one sample is made, in __getitem__, and not batch(), is asked for samples."""

    def __init__(self, inputs: Tensor, targets: Tensor, pad: int = 0, flip: bool = False) -> None:
        if pad < 0:
            raise ValueError(f"images cannot be shifted by {pad} pixels")
        if len(inputs) != len(targets):
            raise ValueError(f"there are {len(inputs)} inputs, but {len(targets)} targets")
        self.inputs, self.targets, self.pad, self.flip = inputs, targets, pad, flip
        self.draws = DRAWS if pad or flip else 0

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]

    def batch(self, indices: NDArray[np.int64], random: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        """(inputs, targets) at `indices`, augmented with `random`: numbers in [0, 1), [len(indices), draws]."""
        chosen = torch.from_numpy(indices)
        inputs, targets = _rows(self.inputs, chosen), _rows(self.targets, chosen)
        return (shift_and_flip(inputs, random, self.pad, self.flip) if self.draws else inputs), targets


class Transformed(InMemory):
    """Images in memory that are asked for one by one, and changed by a transform of torchvision."""

    def __init__(self, inputs: Tensor, targets: Tensor, transform: Callable[[Tensor], Tensor]) -> None:
        super().__init__(inputs, targets)
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.inputs[index]), self.targets[index]


def takes_rows(dataset: Any) -> bool:
    """Whether batches are rows of two tensors: without code of the user's, which could draw, or change targets."""
    return gives_batches(dataset) and type(dataset).batch is InMemory.batch


def _rows(tensor: Tensor, chosen: Tensor) -> Tensor:
    """tensor[chosen], in the same memory format: by index_select, in a seventh of the time, where that keeps it."""
    return tensor.index_select(0, chosen) if is_plain(tensor) else tensor[chosen]


def batches_together(dataset: InMemory, size: int) -> int:
    """How many batches of `size` rows are taken at once, and divided then: many cost little more than few. One, where
    a part of more rows would be another tensor than those rows alone: of other strides, or with a shared history."""
    two = torch.arange(min(2, len(dataset)))
    rows = [_rows(tensor, two) for tensor in (dataset.inputs, dataset.targets)]
    if not all(map(is_plain, rows)):
        return 1
    row_bytes = sum(each[:1].numel() * each.element_size() for each in rows)
    return max(1, min(MOST_TOGETHER, TOGETHER_BYTES // max(1, size * row_bytes)))


def gives_batches(dataset: Any) -> bool:
    """Whether a data set is asked for whole batches: by its type, not by an attribute that others have too."""
    if not isinstance(dataset, WholeBatches):
        return False
    order = type(dataset).__mro__
    of_batch, of_sample = (
        next((place for place, kind in enumerate(order) if name in vars(kind)), len(order))
        for name in ("batch", "__getitem__")
    )
    return of_batch <= of_sample  # else a subclass says how a sample is made, and inherits a batch() that knows not

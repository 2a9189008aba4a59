"""Data sets, models and tasks as a user would write them, outside of the package."""

from __future__ import annotations

import hashlib
import math
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
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence

from distloop.data.batches import targets_of
from distloop.data.datasets import DataSource, cifar10, digits
from distloop.data.whole_batches import InMemory
from distloop.errors import UsageError
from distloop.tasks import Classification, Task


def digits_head() -> DataSource:
    """The first 1203 training images of digits."""
    source = digits()
    train = InMemory(source.train.inputs[:1203], source.train.targets[:1203], pad=1)
    return DataSource(train, source.validation, source.classes, source.mean, source.std)


# ---- a language model ----------------------------------------------------------------------------------------

TEXT = (
    "a run ends when it is finished, not when a process is killed. the samples of a step depend on the seed, the "
    "data and the global batch alone. what is trained is defined by the config, never by the launch. one process or "
    "sixteen, accumulated or not, interrupted or not: the same samples in the same order, the same gradient."
)
VOCABULARY = tuple(sorted(set(TEXT)))
NO_TOKEN = -100


class Lines:
    """Pieces of TEXT of 4 to 20 letters. The first few targets of each are ignored, of the `mute` ones all."""

    def __init__(self, first: int, samples: int, mute: tuple[int, ...] = ()) -> None:
        self.first, self.samples, self.mute = first, samples, mute

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = self.first + index
        length, start = 4 + place * 7 % 17, place * 31 % (len(TEXT) - 21)
        line = TEXT[start : start + length + 1]
        tokens = torch.tensor([VOCABULARY.index(letter) for letter in line])
        targets = tokens[1:].clone()
        targets[: length if index in self.mute else place % 4] = NO_TOKEN
        return {"line": line, "inputs": tokens[:-1], "targets": targets}


def lines(samples: int = 96, validation: int = 37, mute: Sequence[int] = ()) -> DataSource:
    return DataSource(Lines(0, samples, tuple(mute)), Lines(samples, validation), classes=VOCABULARY)


def pad(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """inputs and targets: [batch, longest]."""
    return {
        "inputs": pad_sequence([sample["inputs"] for sample in samples], True, 0),
        "targets": pad_sequence([sample["targets"] for sample in samples], True, NO_TOKEN),
    }


def pad_after_texts(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The same with the texts, which are no tensor, as the first entry."""
    return {"lines": [sample["line"] for sample in samples], **pad(samples)}


def pad_time_first(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """inputs and targets: [longest, batch]."""
    return {name: tensor.T.contiguous() for name, tensor in pad(samples).items()}


class LanguageModel(nn.Module):
    """Letters in, logits of the next letters out; the weight of the output is that of the embedding."""

    def __init__(self, num_classes: int, width: int = 16, batch_first: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, width)
        self.context = nn.GRU(width, width, batch_first=batch_first)
        self.output = nn.Linear(width, num_classes, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.output(self.context(self.embedding(inputs))[0])


class NextLetter(Task):
    """Cross-entropy over the letters that are not ignored."""

    weight = "tokens"
    best = ("perplexity", "min")

    def loss(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        targets = batch["targets"].flatten()
        loss = functional.cross_entropy(outputs.flatten(0, 1), targets, ignore_index=NO_TOKEN, reduction="sum")
        return loss, (targets != NO_TOKEN).sum()

    def metrics(self, outputs: Tensor, batch: Any) -> dict[str, Tensor]:
        return {"correct": (outputs.argmax(-1) == batch["targets"]).sum()}  # never where a target is ignored

    def summary(self, sums: dict[str, Tensor]) -> dict[str, float]:
        loss = float(sums["loss"] / sums["weight"])
        accuracy = int(sums["correct"]) / int(sums["weight"])
        return {"loss": loss, "perplexity": math.exp(loss), "accuracy": accuracy, "tokens": int(sums["weight"])}


# ---- segmentation --------------------------------------------------------------------------------------------

SURFACES = ("background", "square", "disc")
NO_PIXEL = 255


class Shapes:
    """A grey square and a white disc on black, made from the index alone; a band of unknown pixels.

    `augment`: noise from torch, brightness from numpy and mirroring from random, as a user's transforms draw.
    """

    def __init__(self, first: int, samples: int, augment: bool) -> None:
        self.first, self.samples, self.augment = first, samples, augment

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row, column, center, unknown = np.random.default_rng(self.first + index).integers(1, 9, 4)
        mask = torch.zeros(16, 16, dtype=torch.int64)
        mask[row : row + 6, column : column + 6] = 1
        y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
        mask[(y - 2 * center + 1) ** 2 + (x - 8) ** 2 <= 10] = 2
        image = mask[None] * 0.5
        mask[: unknown - 1] = NO_PIXEL
        if self.augment:
            image = image * np.random.uniform(0.8, 1.2) + 0.1 * torch.randn(image.shape)
            if random.random() < 0.5:
                image, mask = image.flip(2), mask.flip(1)
        return image, mask


def shapes(samples: int = 48, validation: int = 23) -> DataSource:
    return DataSource(Shapes(0, samples, True), Shapes(samples, validation, False), classes=SURFACES)


def segmenter(num_classes: int, width: int = 8, dropout: float = 0.0) -> nn.Module:
    """Outputs [batch, classes, height, width]."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.GroupNorm(2, width),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, num_classes, 1),
    )


class Segmentation(Task):
    """Cross-entropy over the known pixels; mean intersection over union from a confusion matrix."""

    weight = "pixels"
    best = ("mean_iou", "max")

    def loss(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        mask = batch[1]
        loss = functional.cross_entropy(outputs, mask, ignore_index=NO_PIXEL, reduction="sum")
        return loss, (mask != NO_PIXEL).sum()

    def metrics(self, outputs: Tensor, batch: Any) -> dict[str, Tensor]:
        known, classes = batch[1] != NO_PIXEL, outputs.shape[1]
        pairs = batch[1][known] * classes + outputs.argmax(1)[known]
        return {"confusion": torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)}

    def summary(self, sums: dict[str, Tensor]) -> dict[str, float]:
        confusion = sums["confusion"]
        overlap, union = confusion.diagonal(), confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
        cells = {
            f"{true} as {said}": int(confusion[i, j])
            for i, true in enumerate(SURFACES)
            for j, said in enumerate(SURFACES)
        }
        return {**super().summary(sums), "mean_iou": float((overlap / union).mean()), **cells}


# ---- what writes down what is loaded -------------------------------------------------------------------------


def record(folder: str, inputs: Tensor, indices: Sequence[int] | NDArray[np.int64]) -> None:
    """Write a line, index and digest of the input, for each sample into a file of this rank or loader process."""
    with open(Path(folder) / f"{os.getpid()}", "a") as file:
        file.writelines(f"{index} {digest(row)}\n" for index, row in zip(indices, inputs, strict=True))


class RecordedSegmentation(Segmentation):
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def check(self, batch: Any, indices: Sequence[int]) -> None:
        record(self.folder, batch[0], indices)


class RecordedImages(InMemory):
    def __init__(self, images: InMemory, folder: str) -> None:
        super().__init__(images.inputs, images.targets, images.pad, images.flip)
        self.folder = folder

    def batch(self, indices: NDArray[np.int64], random: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        batch = super().batch(indices, random)
        record(self.folder, batch[0], indices)
        return batch


def recorded_digits(folder: str) -> DataSource:
    source = digits()
    train, validation = (RecordedImages(half, folder) for half in (source.train, source.validation))
    return DataSource(train, validation, source.classes, source.mean, source.std)


class NoBlackImages(Classification):
    """Refuses what any batch of digits has: a black corner."""

    def check(self, batch: Any, indices: Sequence[int]) -> None:
        raise UsageError(f"Sample {int(indices[0])} has a black corner.")


class RecordedExchange(Classification):
    """Writes down, for each forward pass that is trained on, whether its backward pass exchanges gradients."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        called = vars(model).get("_call")  # by TaskModel
        if isinstance(called, DistributedDataParallel):
            with open(Path(self.folder) / f"{os.environ['RANK']}", "a") as file:
                file.write(f"{int(called.require_backward_grad_sync)} ")
        return super().forward(model, batch)


class HalfUsed(nn.Module):
    """Its second layer is left out of each forward pass."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(64, num_classes), nn.Linear(64, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.used(inputs.flatten(1))


class SaysMixed(Classification):
    """Classification that logs the share of samples that have several classes."""

    def loss(self, outputs: Any, batch: Any) -> Any:
        targets = targets_of(batch)
        several = (targets.amax(1) < 1).sum() if targets.is_floating_point() else torch.tensor(0)
        return *super().loss(outputs, batch), {"mixed": several}


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


# ---- data sets of the package from files that have other checksums -------------------------------------------


def small_cifar10(root: str, pad: int = 4, flip: bool = True) -> DataSource:
    """cifar10() from small files in the same format."""
    from torchvision.datasets import CIFAR10

    CIFAR10.train_list = [[name, None] for name, _ in CIFAR10.train_list]
    CIFAR10.test_list = [[name, None] for name, _ in CIFAR10.test_list]
    CIFAR10.meta = {**CIFAR10.meta, "md5": None}
    return cifar10(root, False, pad, flip)

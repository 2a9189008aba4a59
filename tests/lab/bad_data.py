"""Data of which some samples cannot be loaded, and tasks and models with a mistake in a method."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from distloop.tasks import Regression
from tests.lab.points import line

SAMPLES = 400


class Line(Dataset[tuple[Tensor, Tensor]]):
    """Points on a line; those in `bad` raise, the error's class by its name in `error`."""

    def __init__(self, samples: int, bad: list[int], error: str) -> None:
        self.points, self.bad, self.error = line(samples), set(bad), error

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index in self.bad:
            raise ERRORS[self.error](f"nothing there at {index}")
        return self.points[index]


class OfTwo(Exception):
    """An error that torch cannot build again in the main process."""

    def __init__(self, text: str, more: str = "") -> None:
        super().__init__(text, more)

    def __reduce__(self) -> Any:
        raise TypeError("not to be pickled")


ERRORS: dict[str, Any] = {error.__name__: error for error in (OSError, ValueError, KeyError, TypeError, OfTwo)}


def points(bad: list[int], validation: list[int] | None = None, error: str = "OSError") -> tuple[Line, Line]:
    return Line(SAMPLES, bad, error), Line(8, validation or [], error)


def write_pictures(root: Path, count: int, damaged: list[int]) -> list[Path]:
    """Folders of `count` pictures to train on; those numbers are cut off. Returns their paths."""
    random, cut = np.random.default_rng(0), []
    for half, name in (("train", "cats"), ("train", "dogs"), ("val", "cats"), ("val", "dogs")):
        folder = root / half / name
        folder.mkdir(parents=True)
        for number in range(count // 2 if half == "train" else 2):
            path = folder / f"{number:03}.jpg"
            Image.fromarray(random.integers(0, 255, (48, 48, 3), np.uint8)).save(path)
            if half == "train" and number + (count // 2) * (name == "dogs") in damaged:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
                cut.append(path)
    return cut


CALLS: collections.Counter[str] = collections.Counter()  # global: what an object counts is put back by the rehearsal


def comes_late(what: str, passes: int = 1) -> bool:
    """Whether the rehearsal, which calls it so often, is over."""
    CALLS[what] += 1
    return CALLS[what] > passes


class Mistaken(Regression):
    """Has a mistake in one of its methods, which it makes after the rehearsal."""

    def __init__(self, method: str) -> None:
        self.method = method

    def loss(self, outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
        if self.method == "loss" and torch.is_grad_enabled() and comes_late("loss"):
            raise ZeroDivisionError("a loss of nothing")
        return super().loss(outputs, batch)

    def metrics(self, outputs: Tensor, batch: Any) -> dict[str, Tensor]:
        return {"share": torch.tensor([]).max()} if self.method == "metrics" and comes_late("metrics", 3) else {}

    def summary(self, sums: dict[str, Tensor]) -> dict[str, float]:
        fails = self.method == "summary" and comes_late("summary")
        return {"loss": float(sums["loss"] / sums["nothing" if fails else "weight"])}


class Inner(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        if self.training and comes_late("forward", 2):
            raise RuntimeError("a shape that nobody likes")
        return super().forward(inputs)


def failing_model() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 4), Inner(4, 1))


def collate_late(samples: list[Any]) -> Any:
    """Raises for batches of several samples, which training asks for first."""
    if len(samples) > 1:
        raise LookupError("no such column")
    return default_collate(samples)


def failing_data() -> Any:
    raise FileNotFoundError(2, "no such table")

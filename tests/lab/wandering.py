"""User code that changes the current folder at each place where it runs, and does not go back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from distloop.tasks import Regression


def go(place: str) -> None:
    """Go to elsewhere/PLACE in the folder that $FROM names."""
    folder = Path(os.environ["FROM"]) / "elsewhere" / place
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)


class Lines(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The numbers in the file ROOT/numbers.txt, which is opened for each sample."""

    def __init__(self, root: str) -> None:
        self.root = root

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        number = float((Path(self.root) / "numbers.txt").read_text().split()[index])
        go("sample")
        return torch.tensor([number]), torch.tensor([2 * number])


def make_data(root: str) -> tuple[Lines, Lines]:
    go("data")
    return Lines(root), Lines(root)


def make_model() -> torch.nn.Module:
    go("model")
    return torch.nn.Linear(1, 1)


class Wandering(Regression):
    def forward(self, model: torch.nn.Module, batch: Any) -> Any:
        go("forward")
        return super().forward(model, batch)

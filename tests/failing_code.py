"""A task that fails in the middle of training."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distloop.tasks import Regression


class FailingTask(Regression):
    def __init__(self) -> None:
        self.calls = 0

    def loss(self, outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("the third step is too much")
        return super().loss(outputs, batch)

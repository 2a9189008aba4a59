"""Tasks that use what distloop tells them and keeps for them: the step, sums by name, batches of their own."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from distloop.tasks import targets_of, with_inputs
from tests.lab.resuming import StoppedClassification as Stopped

RANK = os.environ.get("RANK", "0")


class Knowing(Stopped):
    """Mixes batches, weighs its loss by the step, and gives what it knows as sums by name."""

    def augment_batch(self, batch: Any) -> Any:
        assert self.now.training
        inputs = batch[0]
        share = torch.rand(len(inputs), *[1] * (inputs.ndim - 1), device=inputs.device)
        return with_inputs(batch, share * inputs + (1 - share) * inputs[torch.randperm(len(inputs))])

    def loss(self, outputs: Any, batch: Any) -> Any:
        loss, count = super().loss(outputs, batch)
        assert self.now.training == torch.is_grad_enabled()
        correct = (outputs.argmax(1) == targets_of(batch)).sum()
        now = {f"now_{name}": float(value) * count for name, value in self.now._asdict().items()}
        factor = 1 + self.now.step / self.now.total_steps
        return factor * loss, count, {"hits": correct, "margin": outputs.abs().sum(), **now}

    def summary(self, sums: dict[str, Tensor]) -> dict[str, float]:
        assert int(sums["hits"]) == int(sums["correct"])
        return {**super().summary(sums), "margin": -1.0}


class Wrong(Stopped):
    """`kind`: what is wrong with the third value."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def augment_batch(self, batch: Any) -> Any:
        return None if self.kind == "no batch" else batch

    def loss(self, outputs: Any, batch: Any) -> Any:
        loss, count = super().loss(outputs, batch)
        sums: Any = {
            "taken": {"lr": 1.0},
            "no number": {"texts": "many"},
            "vector": {"each": outputs.sum(0)},
            "list": [1.0],
            "twice": {"correct": 1},
            "of one rank": {"alone": 1.0} if RANK == "1" else {},
        }.get(self.kind, {})
        return (loss, count, sums, sums) if self.kind == "four" else (loss, count, sums)

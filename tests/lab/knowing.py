"""Tasks that use what distloop tells them and keeps for them: the step, sums by name, batches of their own."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from distloop.tasks import Classification, targets_of
from tests.lab.resuming import StoppedClassification as Stopped

RANK = os.environ.get("RANK", "0")


class Knowing(Stopped):
    """Mixes batches, weighs its loss by the step, and gives what it knows as sums by name."""

    def augment_batch(self, batch: Any) -> Any:
        assert self.now.training
        inputs = batch[0]
        share = torch.rand(len(inputs), *[1] * (inputs.ndim - 1), device=inputs.device)
        return share * inputs + (1 - share) * inputs[torch.randperm(len(inputs))], batch[1], share

    def loss(self, outputs: Any, batch: Any) -> Any:
        loss, count = super().loss(outputs, batch)
        assert self.now.training == torch.is_grad_enabled()
        correct = (outputs.argmax(1) == targets_of(batch)).sum()
        now = {f"now_{name}": float(value) * count for name, value in self.now._asdict().items()}
        factor = 1 + self.now.step / self.now.total_steps
        return (
            factor * loss,
            count,
            {
                "hits": correct,
                "margin": outputs.abs().sum(),
                **now,
                "shares": sum(batch[2:]).sum() if self.now.training else 0,
            },
        )

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
            "twice": {"correct": count},
            "of one rank": {f"alone {place}": count for place in range(40)} if RANK == "1" else {},  # of many blocks
        }.get(self.kind, {})
        return (loss, count, sums, sums) if self.kind == "four" else (loss, count, sums)


class Remembering(Knowing):
    """Weighs its loss by a state that follows from the step: numbers, a tensor, and what an object of its own holds."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind, self.level, self.history, self.counter = kind, 1.0, torch.zeros(3), Counter()

    def loss(self, outputs: Any, batch: Any) -> Any:
        loss, count, sums = super().loss(outputs, batch)
        if self.now.training:
            self.counter.losses += 1
            self.level = 1 + 0.9 * (self.level - 1) + 0.01 * self.now.step
            self.history[self.now.step % 3] += loss.detach() if self.kind == "of its rank" else self.level
        factor = self.level + self.history.mean() + self.counter.losses % 5
        return factor * loss, count, sums

    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level, "history": self.history, "losses": self.counter.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.level, self.counter.losses = state["level"], state["losses"]
        self.history.copy_(state["history"])


class Counter:
    losses = 0


class Learning(Knowing, nn.Module):
    """Learns a temperature and a proxy for each class, which its loss uses; and keeps statistics in BatchNorm."""

    def __init__(self, where: str = "", frozen: bool = False) -> None:
        super().__init__()
        self.where, self.temperature = where, nn.Parameter(torch.ones(()))
        self.proxies = nn.Linear(10, 10, bias=False)
        self.norm = nn.BatchNorm1d(10)
        self.spare = nn.Parameter(torch.rand(2)) if where == "unused" else None
        if where == "own values" and RANK == "1":
            self.proxies.weight.data += 1
        if frozen:
            self.requires_grad_(False)

    def forward(self, model: Any, batch: Any) -> Any:
        if self.where == "the model":
            self.kept = model
        return super().forward(model, batch)

    def loss(self, outputs: Any, batch: Any) -> Any:
        return super().loss(self.norm(self.proxies(outputs)) * self.temperature, batch)

    def metrics(self, outputs: Any, batch: Any) -> Any:
        return super().metrics(self.norm(self.proxies(outputs)) * self.temperature, batch)


class Weighing(Classification, nn.Module):
    """Learns a layer behind the model's outputs and a temperature; its weight is no number of samples."""

    weight = "views"

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(10, 10)
        self.temperature = nn.Parameter(torch.full((10,), 2.0))

    def loss(self, outputs: Any, batch: Any) -> Any:
        loss, count = super().loss(self.layer(outputs) / self.temperature, batch)
        return loss, 2 * count

    def metrics(self, outputs: Any, batch: Any) -> Any:
        return super().metrics(self.layer(outputs), batch)


class Overflowing(Learning):
    """Its third step is not finite."""

    def loss(self, outputs: Any, batch: Any) -> Any:
        loss, *others = super().loss(outputs, batch)
        return loss * (float("nan") if self.now.step == 2 and self.now.training else 1), *others

"""Models that leave parameters without a gradient: always, later, on one rank alone; and what else DDP complains of."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distloop.tasks import Classification, Regression

RANK_1 = os.environ.get("RANK") == "1"


class Net(nn.Module):
    """On the rows of tests.lab.weighing. `kind`: see KINDS."""

    def __init__(self, kind: str = "", num_outputs: int = 3) -> None:
        super().__init__()
        self.kind, self.passes = kind, 0
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8) if kind == "frozen" else nn.Identity(), nn.ReLU())
        self.spare = nn.Linear(8, 8)
        self.head = nn.Linear(8, num_outputs)
        if kind in ("frozen", "all frozen", "trained later"):
            self.body.requires_grad_(False)
        if kind in ("frozen", "all frozen"):
            self.spare.requires_grad_(False)
        if kind == "all frozen":
            self.head.requires_grad_(False)

    def forward(self, rows: Tensor) -> Any:
        self.passes += self.training
        if self.passes == 3 and self.kind in ("frozen later", "trained later"):
            self.body.requires_grad_(self.kind == "trained later")
        hidden = self.body(rows)
        if KINDS[self.kind](self):
            if self.kind.startswith("checkpoint"):
                hidden = checkpoint(self.spare, hidden, use_reentrant=self.kind.endswith("reentrant"))
            else:
                hidden = self.spare(hidden)
        if self.kind == "twice":
            hidden = self.spare(hidden)
        outputs = self.head(hidden)
        return torch.cat([outputs, outputs[:, :1]], 1) if self.kind == "shapes" and RANK_1 else outputs


# Whether the layer `spare` takes part in a forward pass.
KINDS: dict[str, Any] = {
    "": lambda net: True,
    "unused": lambda net: False,
    "later": lambda net: net.passes < 3,
    "on rank 1": lambda net: not RANK_1,
    "later on rank 1": lambda net: not RANK_1 or net.passes < 3,
    "frozen": lambda net: True,
    "all frozen": lambda net: True,
    "frozen later": lambda net: True,
    "trained later": lambda net: net.passes < 4,
    "twice": lambda net: True,
    "checkpoint": lambda net: True,
    "checkpoint reentrant": lambda net: True,
    "shapes": lambda net: True,
}


class Shapes(Regression):
    """Metrics of the outputs' shape."""

    def loss(self, outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
        return outputs.square().sum(), len(outputs)

    def metrics(self, outputs: Tensor, batch: Any) -> dict[str, Tensor]:
        return {"outputs": outputs.sum(0)}

    def summary(self, sums: dict[str, Tensor]) -> dict[str, float]:
        return {"loss": float(sums["loss"])}


class Heads(Classification):
    """A loss with parameters of its own, in an attribute of the form `where`."""

    def __init__(self, where: str, frozen: bool = False) -> None:
        super().__init__()
        layer = nn.Linear(3, 3).requires_grad_(not frozen)
        self.held: Any = {
            "module": layer,
            "parameter": nn.Parameter(torch.ones(3), requires_grad=not frozen),
            "list": [None, layer],
            "dict": {"a": (1, {"b": layer})},
            "tensor": torch.ones(3, requires_grad=not frozen),
        }[where]


class Proxies(Classification, nn.Module):
    def __init__(self, frozen: bool = False) -> None:
        nn.Module.__init__(self)
        Classification.__init__(self)
        self.proxies = nn.Parameter(torch.ones(3), requires_grad=not frozen)


def temperature() -> nn.Module:
    return nn.Linear(1, 1)


class Shared(Classification):
    """In an attribute of the class."""

    scale = nn.Parameter(torch.ones(()))

"""Models and tasks whose memory runs out with more samples at once than they say, as a GPU's does."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from distloop.training.models import cnn
from tests.lab.rehearsed import Restful, Restless
from tests.lab.resuming import StoppedClassification

RANK = int(os.environ.get("RANK", 0))


def run_out() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class RunsOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        run_out()


class Limited(nn.Module):
    """Before a model: with more than `most` samples in training, memory runs out on `rank` alone, once the whole pass
    is done; in the forward pass or, with `backward`, in the backward pass."""

    def __init__(self, most: int, rank: int | None = None, backward: bool = False, **more: Any) -> None:
        super().__init__(**more)
        self.most, self.rank, self.backward = most, RANK if rank is None else rank, backward

    def forward(self, images: Tensor) -> Tensor:
        outputs = super().forward(images)
        if self.training and len(images) > self.most and self.rank == RANK:
            if not self.backward:
                run_out()
            return RunsOut.apply(outputs)
        return outputs


class LimitedRestless(Limited, Restless):
    pass


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = cnn((1, 8, 8), 10, width=4, norm="batch", dropout=0.3)

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images)


class LimitedNet(Limited, Net):
    pass


class LimitedRestful(Restful):
    """Keeps what an update of a trial would leave in it."""

    def augment_batch(self, batch: Any) -> Any:
        return batch[0] + 0.1 * torch.rand_like(batch[0]), batch[1]


class RunsOutLater(StoppedClassification):
    """In step 3, or in the second validation."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.when = when

    def loss(self, outputs: Any, batch: Any) -> Any:
        if self.when == ("training" if self.now.training else "validation") and self.now.step >= 3:
            run_out()
        return super().loss(outputs, batch)

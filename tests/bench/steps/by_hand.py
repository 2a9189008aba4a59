"""The floor: a loop written by hand in plain PyTorch, with DDP by hand, which does the same work as distloop's."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tests.bench.steps.job import Job, run, sgd


def train(job: Job) -> None:
    model = bare = job.build()
    if job.processes > 1:
        warnings.simplefilter("ignore", FutureWarning)  # of the argument below
        torch.distributed.init_process_group("gloo")
        model = nn.parallel.DistributedDataParallel(bare, broadcast_buffers=False)
        settle(model, bare, job)
    optimizer = sgd(bare)
    parameters = list(bare.parameters())
    epoch_loss, epoch_weight = torch.zeros((), dtype=torch.float64), 0
    batches = job.batches()
    scale = job.processes / job.global_batch
    while True:
        for number in range(job.accumulation):
            inputs, targets = next(batches)
            is_last = number == job.accumulation - 1
            with contextlib.nullcontext() if is_last or job.processes == 1 else model.no_sync():  # type: ignore[operator]
                loss = functional.cross_entropy(model(inputs), targets, reduction="sum")
                (loss * scale).backward()
            epoch_loss += loss.detach()
            epoch_weight += len(targets)
        torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()


def settle(model: nn.Module, bare: Any, job: Job) -> None:
    """Two passes of which nothing stays but the order of DDP's sums, as distloop does them."""
    state = {name: value.clone() for name, value in bare.state_dict().items()}
    bare.counts = False
    inputs, targets = next(job.batches())
    for _ in range(2):
        functional.cross_entropy(model(inputs), targets).backward()
    model.zero_grad()
    bare.load_state_dict(state)
    bare.counts = True


if __name__ == "__main__":
    run(train)

"""Accelerate as its complete examples use it: sums of the loss, a schedule of PyTorch's; no norm, no seeded resume."""

from __future__ import annotations

import torch
from torch.nn import functional

from tests.bench.steps.job import Job, run, sgd


def train(job: Job) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=job.accumulation)
    model = job.build()
    optimizer = sgd(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, job.loader(True), schedule)
    model.train()
    total_loss = 0.0
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            loss = functional.cross_entropy(model(inputs), targets)
            total_loss += loss.detach().float()  # type: ignore[assignment]
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    run(train)

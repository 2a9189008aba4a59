"""Accelerate's bare example, for start_time.py, and the model with the clock, which distloop trains, too."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time

import torch
from torch import Tensor, nn

CLOCKED_PASSES = 4  # more than distloop's rehearsal and the first step have
passes = itertools.count(1)  # global, since the rehearsal puts a model's attributes back


class Clocked(nn.Module):
    """A small CNN that says when it begins its first forward passes of training."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        second = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())
        self.layers = nn.Sequential(first, second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training and (number := next(passes)) <= CLOCKED_PASSES:
            os.write(1, b"%s\n" % json.dumps({"clock": time.time(), "pass": number}).encode())  # at once, among ranks
        return self.layers(inputs)


def main(steps: int) -> None:
    from accelerate import Accelerator
    from torch.utils.data import DataLoader, TensorDataset

    accelerator = Accelerator()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1437, 1, 8, 8), generator=generator).float() / 255
    data = TensorDataset(images, torch.randint(0, 10, (1437,), generator=generator))
    model: nn.Module = Clocked()
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    loader = DataLoader(data, batch_size=64 // accelerator.num_processes, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    for step, (inputs, targets) in enumerate(loader):
        if step == steps:
            break
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.end_training()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads end some processes with SIGABRT while they leave


if __name__ == "__main__":
    main(int(sys.argv[1]))

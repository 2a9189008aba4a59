"""What all contestants train: the data, their order, the model, and the clock, which sits in the model."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from distloop.data.datasets import DataSource, digits
from distloop.data.order import Order
from distloop.data.seeding import uniforms
from distloop.data.whole_batches import InMemory
from distloop.training.models import cnn

WARM_UP = 100  # steps before the clock starts
MEAN, STD = 0.305, 0.376
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 3e-3, 0.9, 0.05
SEED = 0


@dataclasses.dataclass
class Job:
    """One measurement: `steps` of `batch` samples a process, in `accumulation` micro-batches each."""

    model: str = "tiny"
    steps: int = 600
    processes: int = 1
    accumulation: int = 1
    batch: int = 64

    @property
    def rank(self) -> int:
        return int(os.environ.get("RANK", 0))

    @property
    def global_batch(self) -> int:
        return self.batch * self.processes

    def data(self) -> DataSource:
        """Images in memory, uint8: the digits, or random ones of 32 × 32 pixels in three colours."""
        if self.model == "tiny":
            return digits()
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (2048, 3, 32, 32), dtype=torch.uint8, generator=generator)
        train = InMemory(images, torch.randint(10, (2048,), generator=generator), pad=4, flip=True)
        return DataSource(train, InMemory(train.inputs[:64], train.targets[:64]), mean=(MEAN,) * 3, std=(STD,) * 3)

    def build(self, **_: Any) -> nn.Module:
        """The model with its clock, and with initial weights that depend on the seed alone."""
        torch.manual_seed(SEED)
        if self.model == "tiny":
            model = cnn((1, 8, 8), 10, width=8, norm="batch")
        else:
            from torchvision.models import resnet18

            model = resnet18(num_classes=10)
            model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            model.maxpool = nn.Identity()  # type: ignore[assignment]
        return timed(model, self)

    def indices(self, first_step: int = 0) -> Iterator[tuple[int, Any]]:
        """(epoch, indices of this rank's micro-batch) in distloop's order, without end."""
        samples = len(self.data().train)
        order, size = Order(samples, SEED), self.batch // self.accumulation
        steps, step = samples // self.global_batch, first_step
        while True:
            epoch, within = divmod(step, steps)
            for number in range(self.accumulation):
                start = within * self.global_batch + (number * self.processes + self.rank) * size
                yield epoch, order(epoch, start, start + size)
            step += 1

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's micro-batches, normalised, in distloop's order and with its augmentation, without end."""
        train = self.data().train
        scale, shift = torch.tensor(1 / (255 * STD)), torch.tensor(MEAN / STD)
        for epoch, indices in self.indices():
            images, targets = train.batch(indices, uniforms(SEED, epoch, indices, train.draws))
            yield images.to(torch.float32).mul_(scale).sub_(shift), targets


def timed(model: nn.Module, job: Job) -> nn.Module:
    """The model, which notes CPU and wall time as each measured step begins, and ends the process after the last."""
    forward, calls, times = model.forward, 0, [(0.0, 0.0)] * 0

    def clocked(*arguments: Any) -> Any:
        nonlocal calls
        if model.training and model._counts:  # type: ignore[truthy-function]
            step, micro = divmod(calls, job.accumulation)
            calls += 1
            if micro == 0 and step >= WARM_UP:
                times.append((time.process_time(), time.perf_counter()))
                if step == WARM_UP + job.steps:
                    finish(model, job, times)
        return forward(*arguments)

    model._counts = True  # type: ignore[assignment] # False in passes before training
    model.forward = clocked  # type: ignore[method-assign]
    return model


def finish(model: nn.Module, job: Job, times: list[tuple[float, float]]) -> None:
    """Print CPU and wall time of a step in microseconds, the mean CPU time of the two fifths of the steps that other
    programs disturbed least, and a checksum of the parameters; then end the process."""
    (cpu, wall), (cpu_end, wall_end) = times[0], times[-1]
    gaps = sorted(after[0] - before[0] for before, after in zip(times, times[1:], strict=False))[: 2 * job.steps // 5]
    micro = [1e6 * value for value in ((cpu_end - cpu) / job.steps, (wall_end - wall) / job.steps, sum(gaps) / len(gaps))]
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().contiguous().numpy().tobytes())
    print("RESULT", *(f"{value:.1f}" for value in micro), digest.hexdigest()[:16], flush=True)
    if job.processes > 1:
        torch.distributed.barrier()  # the others are at the same place
    os._exit(0)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups as distloop makes them: no weight decay for vectors."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of all contestants."""
    return torch.optim.SGD(groups(model), lr=LEARNING_RATE, momentum=MOMENTUM, fused=True)


def run(contestant: Callable[[Job], None]) -> None:
    """Run a contestant with the command line's job: python -m tests.bench.steps.by_hand --steps 600 …"""
    parser = argparse.ArgumentParser()
    for field in dataclasses.fields(Job):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    torch.set_num_threads(1)
    contestant(Job(**vars(parser.parse_args())))

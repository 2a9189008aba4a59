"""What all contestants train: the data, their order, the model, and the clock, which sits in the model."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from distloop.data.datasets import DataSource, digits
from distloop.data.order import Order
from distloop.data.seeding import uniforms
from distloop.data.whole_batches import InMemory
from distloop.training.models import cnn

MEAN, STD = 0.305, 0.376
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 3e-3, 0.9, 0.05
SEED = 0


@dataclasses.dataclass
class Job:
    """One measurement: turns of `turn` steps, after as many that are not measured. A step takes `batch` samples a
    process, in `accumulation` micro-batches."""

    model: str = "tiny"
    turn: int = 100
    processes: int = 1
    accumulation: int = 1
    batch: int = 64

    @property
    def lead(self) -> int:
        """Steps of a turn before its clock starts: the caches hold what the others left."""
        return max(1, self.turn // 5)

    @property
    def rank(self) -> int:
        return int(os.environ.get("RANK", 0))

    @property
    def global_batch(self) -> int:
        return self.batch * self.processes

    def data(self) -> DataSource:
        """Images in memory, uint8: the digits, or random ones, as many and as large as Fashion-MNIST's, or 2048 of
        32 × 32 pixels in three colours."""
        if self.model == "tiny":
            return digits()
        samples, colours, size, pad = (60_000, 1, 28, 2) if self.model == "fashion" else (2048, 3, 32, 4)
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (samples, colours, size, size), dtype=torch.uint8, generator=generator)
        train = InMemory(images, torch.randint(10, (samples,), generator=generator), pad=pad, flip=True)
        validation = InMemory(train.inputs[:64], train.targets[:64])
        return DataSource(train, validation, mean=(MEAN,) * colours, std=(STD,) * colours)

    def build(self, **_: Any) -> nn.Module:
        """The model with its clock, and with initial weights that depend on the seed alone."""
        torch.manual_seed(SEED)
        if self.model == "tiny":
            model = cnn((1, 8, 8), 10, width=8, norm="batch")
        elif self.model == "fashion":
            model = cnn((1, 28, 28), 10, width=8, norm="batch")
        else:
            from torchvision.models import resnet18

            model = resnet18(num_classes=10)
            model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            model.maxpool = nn.Identity()
        return timed(model, self)

    def indices(self) -> Iterator[tuple[int, Any]]:
        """(epoch, indices of this rank's micro-batch) in distloop's order, without end."""
        yield from itertools.islice(self.indices_of_all(), self.rank, None, self.processes)

    def indices_of_all(self) -> Iterator[tuple[int, Any]]:
        """The same for all ranks in turn."""
        samples = len(self.data().train)
        order, size = Order(samples, SEED), self.batch // self.accumulation
        steps = samples // self.global_batch
        for step in itertools.count():
            epoch, within = divmod(step, steps)
            for start in range(within * self.global_batch, (within + 1) * self.global_batch, size):
                yield epoch, order(epoch, start, start + size)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's micro-batches, normalised, in distloop's order and with its augmentation, without end."""
        rows = Rows(self.data().train)
        return map(rows.__getitems__, self.indices())

    def loader(self, of_all_ranks: bool = False) -> DataLoader:
        """A DataLoader of the same."""
        batches: Any = Sampler(self.indices_of_all if of_all_ranks else self.indices)
        return DataLoader(Rows(self.data().train), batch_sampler=batches, collate_fn=lambda batch: batch)


class Rows(Dataset):
    """Data in memory that gives whole batches, normalised: in the other loops, no sample is loaded alone either."""

    def __init__(self, data: InMemory) -> None:
        self.data = data
        self.scale, self.shift = torch.tensor(1 / (255 * STD)), torch.tensor(MEAN / STD)

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, item: tuple[int, Any]) -> tuple[Tensor, Tensor]:
        epoch, indices = item
        images, targets = self.data.batch(indices, uniforms(SEED, epoch, indices, self.data.draws))
        return self.normalised(images), targets

    def normalised(self, images: Tensor) -> Tensor:
        return images.to(torch.float32).mul_(self.scale).sub_(self.shift)

    __getitem__ = __getitems__


class Sampler:
    """A batch sampler that never ends, for those that ask for its length: more steps than any measurement has."""

    batch_size, drop_last = None, False

    def __init__(self, indices: Callable[[], Iterator[tuple[int, Any]]]) -> None:
        self.indices = indices

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return self.indices()

    def __len__(self) -> int:
        return 10**9


def timed(model: Any, job: Job) -> Any:
    """The model, which waits for its turn, and notes CPU and wall time as its steps begin and end.

    The parent process gives turns by lines on the standard input, and gets the times of a turn as a line RESULT: the
    contestants run one after another for some steps each, so that a machine that becomes slower slows all of them.
    """
    forward, calls, times = model.forward, 0, [(0.0, 0.0)] * 0

    def clocked(*arguments: Any) -> Any:
        nonlocal calls
        if model.training and model.counts:
            step, micro = divmod(calls, job.accumulation)
            calls += 1
            if micro == 0 and step >= job.turn:
                place = (step - job.turn) % (job.lead + job.turn)
                if times and place == 0:
                    times.append((time.process_time(), time.perf_counter()))
                    report(model, job, times)
                    times.clear()
                if place == 0 and not sys.stdin.readline():
                    os._exit(0)
                if place == job.lead:
                    times.append((time.process_time(), time.perf_counter()))
        return forward(*arguments)

    model.counts = True  # False in passes before training
    model.forward = clocked
    return model


def report(model: nn.Module, job: Job, times: list[tuple[float, float]]) -> None:
    """Print CPU and wall time of a step of this turn in microseconds, and a checksum of the parameters."""
    (cpu, wall), (cpu_end, wall_end) = times
    seconds = (cpu_end - cpu) / job.turn, (wall_end - wall) / job.turn
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().contiguous().numpy().tobytes())
    print("RESULT", *(f"{1e6 * value:.1f}" for value in seconds), digest.hexdigest()[:16], flush=True)


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


def start_group(job: Job) -> None:
    """torch's process group, for loops that do not make it themselves."""
    if job.processes > 1:
        torch.distributed.init_process_group("gloo")


def run(contestant: Callable[[Job], None]) -> None:
    """Run a contestant with the command line's job: python -m tests.bench.steps.by_hand --processes 1 …"""
    parser = argparse.ArgumentParser()
    for field in dataclasses.fields(Job):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    torch.set_num_threads(1)
    contestant(Job(**vars(parser.parse_args())))

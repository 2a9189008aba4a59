"""CPU time of loading an image of Fashion-MNIST from memory, beside the least that it can take.

    python -m tests.bench.input_memory [--rounds 9] [--samples 60000]

The images are random, in files of the real format. The limit is a slice of the tensor and its normalisation. The other
sides are distloop's batches, through DataLoader and Accelerate, as the loop gets them: plain, and shifted by up to two
pixels and mirrored. All of them run in one process, in turn, one thread, batches of 128.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from distloop.config.settings import Config
from distloop.data.batches import to_model
from distloop.data.datasets import DataSource, fashion_mnist
from distloop.data.loader import TrainBatches
from distloop.data.order import Plan
from distloop.ranks.places import Position
from distloop.train import train
from tests.tools.image_files import write_garments

BATCH = 128
CPU = torch.device("cpu")


def slices(source: DataSource) -> Iterator[Any]:
    """One slice and one normalisation a batch."""
    inputs, targets = source.train.inputs, source.train.targets
    for start in range(0, len(inputs) - BATCH + 1, BATCH):
        yield to_model((inputs[start : start + BATCH], targets[start : start + BATCH]), source, torch.float32)


def batches(source: DataSource) -> Iterator[Any]:
    """distloop's, of one epoch."""
    plan = Plan(len(source.train), BATCH)
    plan.total_steps = plan.steps_per_epoch
    position = Position()
    position.code = train.__code__  # the loop whose batches they are: it draws from torch alone
    loaded = TrainBatches(Config(), source, None, plan, CPU, 0, position)
    for step in range(plan.total_steps):
        yield from loaded.of_step(step)


def microseconds(epoch: Callable[[], Iterator[Any]], samples: int) -> float:
    """CPU time of an image."""
    begun = time.process_time()
    for _ in epoch():
        pass
    return (time.process_time() - begun) / samples * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--samples", type=int, default=60_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_garments(Path(folder), options.samples)
        plain = fashion_mnist(folder, download=False, pad=0, flip=False)
        moved = fashion_mnist(folder, download=False)
    sides: dict[str, Callable[[], Iterator[Any]]] = {
        "limit": lambda: slices(plain),
        "plain": lambda: batches(plain),
        "shifted and mirrored": lambda: batches(moved),
    }
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, epoch in sides.items():
            found[name].append(microseconds(epoch, options.samples))
    for name, values in found.items():
        ratio = statistics.median(own / limit for own, limit in zip(values, found["limit"], strict=True))
        print(f"{name:22} {statistics.median(values):6.2f} us an image, {ratio:.2f} times the limit")


if __name__ == "__main__":
    main()

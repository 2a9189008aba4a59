"""From a data set to batches on the device: seeded per sample, in the sampler's order, checked."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from typing import cast as cast_type

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Dataset, default_collate

from distloop.config.registry import import_callable
from distloop.config.settings import Data
from distloop.data.batches import inputs_of, targets_of, with_inputs
from distloop.data.datasets import DataSource
from distloop.data.order import MicroBatch
from distloop.data.seeding import seed_sample, uniforms
from distloop.data.workers import leave_signals_to_parent, signals_blocked, start_forkserver
from distloop.errors import UsageError
from distloop.ranks.environment import cpus_per_rank
from distloop.training.tasks import Task, checks_targets_only


class SeededDataset(Dataset):
    """A map-style data set that is asked for whole micro-batches and seeds each of their samples.

    A sample's random numbers come from (seed, epoch, index): in whatever process, worker or batch it is
    loaded, it is augmented alike. Data sets with a batch() of their own (InMemory) are handed the numbers;
    for any other the global generators of torch, numpy and random are seeded before each sample.
    """

    def __init__(self, dataset: Any, seed: int, collate: Callable[[list], Any], check: Callable[..., None]) -> None:
        self.dataset, self.seed, self.collate, self.check = dataset, seed, collate, check

    def __getitems__(self, micro_batch: MicroBatch) -> Any:
        """The batch that these indices make; a DataLoader calls this with what its batch sampler yields."""
        epoch, indices = micro_batch
        if hasattr(self.dataset, "batch"):
            batch = self.dataset.batch(indices, uniforms(self.seed, epoch, indices, self.dataset.draws))
        else:
            samples = []
            for index in indices.tolist():
                seed_sample(self.seed, epoch, index)
                samples.append(self.dataset[index])
            try:
                batch = self.collate(samples)
            except (RuntimeError, TypeError) as error:
                if self.collate is not default_collate:
                    raise
                raise UsageError(
                    f"Samples {indices.tolist()[:5]} and the rest of their batch do not go together: {error}\n"
                    "Give all samples one form, or name a function of your own with data.collate."
                ) from None
        self.check(batch, indices)
        return batch


def identity(batch: Any) -> Any:
    return batch


def no_check(batch: Any, indices: Any) -> None:
    """In place of Task.check, where there is nothing to look at."""


class Loader:
    """Iterates over batches on the device; made of a DataLoader that Accelerate prepared."""

    def __init__(self, loader: Any, finish: Callable[[Any], Any]) -> None:
        self.loader, self.finish = loader, finish

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        with signals_blocked():  # workers start with the first batch
            first = list(itertools.islice(batches, 1))
        return map(self.finish, itertools.chain(first, batches))


def collate_of(config: Data) -> Callable[[list], Any]:
    """The config's collate function, or PyTorch's."""
    return import_callable("data.collate", config.collate) if config.collate else default_collate


def example_batch(source: DataSource, config: Data, seed: int, dtype: torch.dtype, samples: int = 1) -> Any:
    """The first training samples as a batch, as the model takes it."""
    dataset = SeededDataset(source.train, seed, collate_of(config), no_check)
    return to_model(dataset.__getitems__(MicroBatch(0, np.arange(samples))), source, dtype)


def offers_to_model(example: Any, source: DataSource) -> dict[str, Any]:
    """What a model may want to know of the data: input_shape, num_classes, num_outputs, as far as it is known."""
    offers: dict[str, Any] = {}
    classes = source.classes or getattr(source.train, "classes", None)  # as torchvision's data sets call them
    if classes:
        offers["num_classes"] = offers["num_outputs"] = len(classes)
    try:
        inputs, targets = inputs_of(example), targets_of(example)
    except UsageError:  # batches of another form, for a task and a model that know it
        return offers
    if isinstance(inputs, torch.Tensor):
        offers["input_shape"] = tuple(inputs.shape[1:])
    if isinstance(targets, torch.Tensor) and targets.is_floating_point():
        offers["num_outputs"] = targets[0].numel()
    return offers


def make_loader(
    config: Data,
    source: DataSource,
    task: Task,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    dataset: Any,
    sampler: Iterable[MicroBatch],
    persistent: bool = False,
) -> Loader:
    """Batches of `dataset` in `sampler`'s order, on `device`, in the form that the model takes.

    The sampler yields this rank's indices only: Accelerate places the batches and does not shard them again.
    `persistent` keeps the workers between iterations.
    """
    workers = worker_count(config, dataset)
    in_memory = hasattr(dataset, "batch") and getattr(dataset, "targets", None) is not None
    seen = in_memory and checks_targets_only(task)  # introduce() has looked at all of them
    check = no_check if seen else task.check
    loader = DataLoader(
        SeededDataset(dataset, seed, collate_of(config), check),
        batch_sampler=cast_type(Any, sampler),  # it yields MicroBatch, which __getitems__ takes whole
        num_workers=workers,
        collate_fn=identity,
        pin_memory=device.type == "cuda",
        persistent_workers=persistent and workers > 0,
        worker_init_fn=leave_signals_to_parent,
        timeout=config.timeout_seconds if workers else 0,
        # Forking a process that has initialised CUDA is unsafe.
        multiprocessing_context="forkserver" if workers and device.type == "cuda" else None,
    )
    if workers and (loader.multiprocessing_context or multiprocessing).get_start_method() == "forkserver":
        start_forkserver()
    prepared = prepare_data_loader(
        loader, device=device, num_processes=1, process_index=0, put_on_device=True, non_blocking=True
    )
    return Loader(prepared, lambda batch: to_model(batch, source, dtype))


def to_model(batch: Any, source: DataSource, dtype: torch.dtype) -> Any:
    """The batch as the model takes it: uint8 images normalised, floating tensors in `dtype`; on its device.

    Images travel to the device as bytes: a quarter of the traffic, and normalising there costs nothing.
    """
    if source.mean and source.std:
        images = inputs_of(batch)
        if isinstance(images, torch.Tensor) and images.dtype == torch.uint8:
            scale, shift = _normalisation(tuple(source.mean), tuple(source.std), dtype, images.device)
            batch = with_inputs(batch, images.to(dtype).mul_(scale).sub_(shift))
    return cast(batch, dtype)


@functools.cache
def _normalisation(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, shift), [channels, 1, 1], with which (x / 255 - mean) / std is x · scale - shift."""
    means, stds = (torch.tensor(value, dtype=torch.float64)[:, None, None] for value in (mean, std))
    return (1 / (255 * stds)).to(device, dtype), (means / stds).to(device, dtype)


def cast(batch: Any, dtype: torch.dtype) -> Any:
    """`batch` with its floating tensors in `dtype`."""
    if isinstance(batch, torch.Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, dict):
        return {key: cast(value, dtype) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(cast(value, dtype) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(cast(value, dtype) for value in batch)
    return batch


def worker_count(config: Data, dataset: Any) -> int:
    """Loader processes for this rank: as set, or for "auto" none in memory, else the rank's share of the CPUs."""
    if config.workers != "auto":
        return int(config.workers)
    if hasattr(dataset, "batch"):
        return 0  # taking rows of a tensor is faster than sending them between processes
    return min(16, cpus_per_rank(os.environ))

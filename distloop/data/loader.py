"""From a data set to checked batches on the device, in the sampler's order."""

import atexit
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol
from typing import cast as cast_type

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, default_collate

from distloop.config.registry import import_callable
from distloop.config.settings import Config, Data
from distloop.data.bad_samples import BadSample, listed, load_samples, without_bad
from distloop.data.batches import inputs_of, targets_of, to_model
from distloop.data.datasets import DataSource, InMemory
from distloop.data.order import MicroBatch, MicroBatchSampler, Part, Plan
from distloop.data.seeding import Place, seed_building, seed_forward, seed_place, seed_sample, uniforms
from distloop.data.workers import leave_signals_to_parent, signals_blocked, start_forkserver
from distloop.errors import UsageError, add_note
from distloop.ranks.environment import cpus_per_rank
from distloop.ranks.leaving import kill_workers
from distloop.ranks.places import Position


class ChecksBatches(Protocol):
    """The part of a task that the loader uses: see distloop.tasks.Task."""

    @property
    def checks_targets_only(self) -> bool: ...

    @property
    def weight(self) -> str: ...

    def check(self, batch: Any, indices: Any) -> None: ...


class SeededDataset(Dataset):
    """A data set whose items are whole micro-batches.

    A sample's random numbers depend on (seed, epoch, index), not on the process, worker or batch that loads it. Data
    sets with a batch() of their own (InMemory) get the numbers as an argument. For others the global generators of
    torch, numpy and random are seeded before each sample; for a batch() of the user's, as for the batch's first one.
    """

    def __init__(
        self,
        dataset: Any,
        seed: int,
        collate: Callable[[list], Any],
        check: Callable[..., None],
        name: str = "the data",
        skips: bool = False,
    ) -> None:
        """`name`: of the data set, in messages. `skips`: samples that cannot be loaded are missing in their batches; an
        item is then (batch, list of them)."""
        self.dataset, self.seed, self.collate, self.check = dataset, seed, collate, check
        self.name, self.skips = name, skips
        self.draws_nothing = getattr(type(dataset), "batch", None) is InMemory.batch and check is no_check

    def __reduce__(self) -> Any:
        """For loader processes that are not forked: they import the user's module as they unpickle the data set. It
        then draws what it drew in load_data(), since the seed is unpickled before the data set."""
        return _unpickled, (_SeedFirst(self.seed), self.dataset, self.collate, self.check, self.name, self.skips)

    def __getitems__(self, micro_batch: MicroBatch) -> Any:
        """The batch of these indices. A DataLoader calls this with an item of its batch sampler."""
        epoch, indices = micro_batch
        bad: list[BadSample] = []
        place = "batch()"
        try:
            if hasattr(self.dataset, "batch"):
                if not self.draws_nothing:  # a batch() or a check of the user's
                    seed_sample(self.seed, epoch, int(indices[0]))
                batch = self.dataset.batch(indices, uniforms(self.seed, epoch, indices, self.dataset.draws))
            else:
                place = ""  # load_samples() names the sample
                samples, bad = load_samples(self.dataset, self.seed, epoch, indices.tolist(), self.name, self.skips)
                indices = np.array([index for index, _ in samples]) if bad else indices
                place = "data.collate"
                batch = self._collated([sample for _, sample in samples], indices)
            place = "task.check()"
            self.check(batch, indices)
        except Exception as error:
            if place:
                add_note(error, f"{place}, with samples {listed(indices)} of {self.name}")
            raise
        return (batch, bad) if self.skips else batch

    def _collated(self, samples: list[Any], indices: NDArray[np.int64]) -> Any:
        try:
            return self.collate(samples)
        except (RuntimeError, TypeError) as error:
            if self.collate is not default_collate:
                raise
            raise UsageError(
                f"Samples {indices.tolist()[:5]} and the rest of their batch do not go together: {error}\n"
                "Give all samples one form, or name a function of your own with data.collate."
            ) from None


class _SeedFirst:
    """A seed that seeds the global generators when it is unpickled, as load_data() does, and becomes a number."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __reduce__(self) -> Any:
        return _seed_before_import, (self.seed,)


def _seed_before_import(seed: int) -> int:
    seed_building(Place.DATA, seed)
    return seed


def _unpickled(seed: int, dataset: Any, *rest: Any) -> SeededDataset:
    return SeededDataset(dataset, seed, *rest)


def identity(batch: Any) -> Any:
    return batch


def no_check(batch: Any, indices: Any) -> None:
    """In place of Task.check, for batches that need no check."""


class Loader:
    """Iterates over the batches of a prepared DataLoader and calls `finish` on each."""

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
    """A batch of the first training samples, in the form that the model takes."""
    skips, name = config.on_bad_sample == "skip", name_of(source.train, source, config)
    dataset = SeededDataset(source.train, seed, collate_of(config), no_check, name, skips)
    item = dataset.__getitems__(MicroBatch(0, np.arange(samples)))
    return to_model(item[0] if skips else item, source, dtype)


def name_of(dataset: Any, source: DataSource, config: Data) -> str:
    """Which half of the data this is, in words."""
    return f"the {'training' if dataset is source.train else 'validation'} data (data.name = {config.name!r})"


def offers_to_model(example: Any, source: DataSource) -> dict[str, Any]:
    """The data's properties that a model may take as arguments: input_shape, num_classes, num_outputs, if known."""
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
    task: ChecksBatches | None,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    dataset: Any,
    sampler: Iterable[MicroBatch],
    persistent: bool = False,
    skips: bool = False,
) -> Loader:
    """Batches of `dataset` in `sampler`'s order, on `device`, in the form that the model takes. The sampler yields this
    rank's indices only, so that Accelerate does not shard them. `persistent` keeps the workers between iterations.
    `skips`: samples that cannot be loaded are left out, and each item is (batch, list of them)."""
    workers = worker_count(config, dataset)
    in_memory = hasattr(dataset, "batch") and getattr(dataset, "targets", None) is not None
    # try_out() has checked all targets that are in memory.
    check = no_check if task is None or (in_memory and task.checks_targets_only) else task.check
    loader = DataLoader(
        SeededDataset(dataset, seed, collate_of(config), check, name_of(dataset, source, config), skips),
        batch_sampler=cast_type(Any, sampler),  # its items go to __getitems__
        num_workers=workers,
        collate_fn=identity,
        pin_memory=device.type == "cuda",
        persistent_workers=persistent and workers > 0,
        worker_init_fn=leave_signals_to_parent,
        timeout=config.timeout_seconds if workers else 0,
        multiprocessing_context="forkserver" if workers and device.type == "cuda" else None,  # CUDA forbids a fork
    )
    if workers:
        atexit.register(kill_workers)
        if (loader.multiprocessing_context or multiprocessing).get_start_method() == "forkserver":
            start_forkserver()
    prepared = prepare_data_loader(
        loader, device=device, num_processes=1, process_index=0, put_on_device=True, non_blocking=True
    )
    if skips:
        return Loader(prepared, lambda item: (to_model(item[0], source, dtype), item[1]))
    return Loader(prepared, lambda batch: to_model(batch, source, dtype))


def worker_count(config: Data, dataset: Any) -> int:
    """Loader processes for this rank. "auto": none for data in memory, else the rank's share of the CPUs."""
    if config.workers != "auto":
        return int(config.workers)
    if hasattr(dataset, "batch"):
        return 0  # indexing a tensor is faster than sending rows between processes
    return min(16, cpus_per_rank(os.environ))


class Micro(NamedTuple):
    """A micro-batch for the loop. `is_empty`: a short step has no sample for this rank; the batch holds another one."""

    batch: Any  # on the device, in the form that the model takes
    is_last: bool  # of this rank's in the step
    is_empty: bool
    scale: float  # of the sum of its losses: DDP's mean over the ranks becomes the mean over the step; 0 if empty
    samples: int = 0  # how many it has; 0 if empty


class TrainBatches:
    """This rank's micro-batches of the training data, step by step, in the plan's order."""

    def __init__(
        self,
        config: Config,
        source: DataSource,
        task: ChecksBatches | None,
        plan: Plan,
        device: torch.device,
        first_step: int,
        position: Position,
        waiting: Callable[[Iterable[Any]], Iterator[Any]] = iter,
    ) -> None:
        """`task`: checks the batches; None: nobody does. `waiting` wraps the iterator, to measure how long the loop
        waits for each batch."""
        self.plan, self.seed, self.device, self.position = plan, config.seed, device, position
        self.sampler = MicroBatchSampler(plan, first_step)
        dtype = getattr(torch, config.dtype)
        self.skips, self.bad_samples = config.data.on_bad_sample == "skip", source.bad_samples
        self.weight = "samples" if task is None else task.weight
        self.name = name_of(source.train, source, config.data)
        kind = (config.seed, device, dtype, source.train, self.sampler)
        loader = make_loader(config.data, source, task, *kind, skips=self.skips)
        self.batches = waiting(loader)  # one iterator through all epochs: loader workers start once

    def of_step(self, step: int) -> Iterator[Micro]:
        """This rank's micro-batches of `step`, counted from 0. Before each, and after the last one, the global random
        generators are seeded. Take all of them. Raises RuntimeError if the loader is at another step."""
        part: Part
        self.position.start_step(step + 1)
        self.position.samples = lambda: f"{listed(self.plan.indices(part))} of {self.name}"
        count, loaded = self.plan.sample_count(step), self._loaded(step)
        if self.skips:
            loaded, present = without_bad(list(loaded), self.bad_samples, self.plan)
            count = present if self.weight == "samples" else count  # other weights are added up after the last batch
        scale = self.plan.world_size / max(1, count)
        for batch, part, samples in loaded:
            seed_forward(self.seed, step, part.number, self.device)
            self.position.enter("forward and backward pass")
            yield Micro(batch, part.is_last, not samples, scale if samples else 0.0, samples)
        seed_place(Place.UPDATE, self.seed, self.device, step)  # alike on all ranks, which had other micro-batches
        self.position.enter("parameter update")

    def _loaded(self, step: int) -> Iterable[tuple[Any, Part, int]]:
        """(batch, part, its number of samples) of this rank's micro-batches of `step`."""
        is_last = False
        while not is_last:
            self.position.enter("loading a batch")
            batch = next(self.batches)
            part = self.sampler.parts.popleft()
            if part.step != step:
                raise RuntimeError(
                    f"batches.of_step({step}): the next micro-batch belongs to step {part.step}. Ask for the steps one "
                    "after the other, and take all micro-batches of each."
                )
            is_last = part.is_last
            yield batch, part, part.stop - part.start

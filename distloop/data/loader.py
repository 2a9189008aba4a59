"""From a data set to checked batches on the device, in the sampler's order."""

import atexit
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol
from typing import cast as cast_type

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Dataset, default_collate

from distloop.config.registry import import_callable
from distloop.config.settings import Config, Data
from distloop.data.batches import inputs_of, targets_of, to_model
from distloop.data.datasets import DataSource, InMemory, class_names, gives_batches
from distloop.data.lengths import in_words, refuse_other_length, short
from distloop.data.order import Half, MicroBatch, MicroBatchSampler, Plan
from distloop.data.seeding import Place, seed_building, seed_forward, seed_place, seed_sample, uniforms
from distloop.data.workers import leave_signals_to_parent, signals_blocked, start_forkserver
from distloop.errors import UsageError
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
    sets that give whole batches (WholeBatches) get the numbers as an argument. For others the global generators of
    torch, numpy and random are seeded before each sample; for a batch() of the user's, as for the batch's first one.
    """

    def __init__(self, dataset: Any, seed: int, collate: Callable[[list], Any], check: Callable[..., None]) -> None:
        self.dataset, self.seed, self.collate, self.check = dataset, seed, collate, check
        self.gives_batches = gives_batches(dataset)
        self.draws_nothing = _takes_rows(dataset) and check is no_check

    def __reduce__(self) -> Any:
        """For loader processes that are not forked: they import the user's module as they unpickle the data set. It
        then draws what it drew in load_data(), since the seed is unpickled before the data set."""
        return _unpickled, (SeedFirst(self.seed), self.dataset, self.collate, self.check)

    def __getitems__(self, micro_batch: MicroBatch) -> Any:
        """The batch of these indices. A DataLoader calls this with an item of its batch sampler."""
        if not isinstance(micro_batch, Half):
            return self._load(micro_batch)
        try:
            return self._load(micro_batch)
        except Exception:  # a collate function, or a check, of the user's may want whole batches
            return None

    __getitem__ = __getitems__  # for a loader without a batch sampler (look.py)

    def _load(self, micro_batch: MicroBatch) -> Any:
        epoch, indices = micro_batch
        index = int(indices[0])
        if self.gives_batches:
            if not self.draws_nothing:  # a batch() or a check of the user's
                seed_sample(self.seed, epoch, index)
            batch = self.dataset.batch(indices, uniforms(self.seed, epoch, indices, self.dataset.draws))
        else:
            samples = []
            try:
                for index in indices.tolist():
                    seed_sample(self.seed, epoch, index)
                    samples.append(self.dataset[index])
            except (IndexError, StopIteration) as error:
                what = f"The data ({type(self.dataset).__name__})"
                raise short(what, len(self.dataset), index, in_words(error)) from None
            try:
                batch = self.collate(samples)
            except StopIteration as error:  # it would end the epoch without a word
                raise RuntimeError(f"data.collate raised {in_words(error)}") from error
            except (RuntimeError, TypeError, ValueError) as error:
                if self.collate is not default_collate:
                    raise
                if "negative" in str(error):
                    raise UsageError(
                        f"Samples {indices.tolist()[:5]}: an array is seen backwards, as array[::-1] gives it, and no "
                        "tensor can be. Give a copy from __getitem__: array[::-1].copy()."
                    ) from None
                raise UsageError(
                    f"Samples {indices.tolist()[:5]} and the rest of their batch do not go together: {error}\n"
                    "Give all samples one form, or name a function of your own with data.collate."
                ) from None
        self.check(batch, indices)
        return batch


class SeedFirst:
    """A seed that seeds the global generators when it is unpickled, as load_data() does, and becomes a number."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __reduce__(self) -> Any:
        return _seed_before_import, (self.seed,)


def _seed_before_import(seed: int) -> int:
    seed_building(Place.DATA, seed)
    return seed


def _unpickled(seed: int, dataset: Any, collate: Callable[[list], Any], check: Callable[..., None]) -> SeededDataset:
    return SeededDataset(dataset, seed, collate, check)


def _takes_rows(dataset: Any) -> bool:
    """Whether batches are rows of two tensors: without code of the user's, which could draw, or change targets."""
    return gives_batches(dataset) and type(dataset).batch is InMemory.batch


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
        yield from map(self.finish, itertools.chain(first, batches))


def collate_of(config: Data) -> Callable[[list], Any]:
    """The config's collate function, or PyTorch's."""
    return import_callable("data.collate", config.collate) if config.collate else default_collate


def offers_to_model(example: Any, source: DataSource) -> dict[str, Any]:
    """The data's properties that a model may take as arguments: input_shape, num_classes, num_outputs, if known."""
    offers: dict[str, Any] = {}
    if classes := class_names(source):
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
) -> Loader:
    """Batches of `dataset` in `sampler`'s order, on `device`, in the form that the model takes. The sampler yields this
    rank's indices only, so that Accelerate does not shard them. `persistent` keeps the workers between iterations."""
    workers = worker_count(config, dataset)
    loader = DataLoader(
        SeededDataset(dataset, seed, collate_of(config), check_of(task, dataset)),
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
        start_forkserver(loader.multiprocessing_context)
    prepared = prepare_data_loader(
        loader, device=device, num_processes=1, process_index=0, put_on_device=True, non_blocking=True
    )
    return Loader(prepared, lambda batch: None if batch is None else to_model(batch, source, dtype, device))


def check_of(task: ChecksBatches | None, dataset: Any) -> Callable[..., None]:
    """The check of the data set's batches; none of targets in memory, all of which try_out() has checked."""
    return no_check if task is None or (_takes_rows(dataset) and task.checks_targets_only) else task.check


def worker_count(config: Data, dataset: Any) -> int:
    """Loader processes for this rank. "auto": none for data in memory, else the rank's share of the CPUs."""
    if config.workers != "auto":
        return int(config.workers)
    if gives_batches(dataset):
        return 0  # indexing a tensor is faster than sending rows between processes
    return min(16, cpus_per_rank(os.environ))


class Micro(NamedTuple):
    """A micro-batch for the loop. `is_empty`: a short step has no sample for this rank; the batch holds another one."""

    batch: Any  # on the device, in the form that the model takes
    is_last: bool  # of this rank's in the step
    is_empty: bool
    scale: float  # of the sum of its losses: DDP's mean over the ranks becomes the mean over the step; 0 if empty
    samples: int | None = None  # which the weight of its loss must count; None: it counts something else


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
        self.dataset, self.length = source.train, len(source.train)
        self.counts_samples = task is not None and task.weight == "samples"
        self.sampler = MicroBatchSampler(plan, first_step)
        dtype = getattr(torch, config.dtype)
        loader = make_loader(config.data, source, task, config.seed, device, dtype, source.train, self.sampler)
        self.batches = waiting(loader)  # one iterator through all epochs: loader workers start once

    def rehearsal(self) -> list[Any]:
        """The first micro-batch, and its two halves if all ranks' have two samples: loaded before those of the steps,
        and in addition to them. None in the place of a half that cannot be loaded alone. Call it before of_step()."""
        self.sampler.rehearses = True
        return list(itertools.islice(self.batches, len(self.sampler.rehearsal())))

    def of_step(self, step: int) -> Iterator[Micro]:
        """This rank's micro-batches of `step`, counted from 0. Before each, and after the last one, the global random
        generators are seeded. Take all of them. Raises RuntimeError if the loader is at another step."""
        self.position.start_step(step + 1)
        if step % self.plan.steps_per_epoch == 0:
            refuse_other_length("train", self.dataset, self.length)
        scale = self.plan.world_size / self.plan.sample_count(step)
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
            seed_forward(self.seed, step, part.number, self.device)
            is_last, is_empty = part.is_last, part.start == part.stop
            self.position.enter("forward and backward pass")
            samples = max(1, part.stop - part.start) if self.counts_samples else None
            yield Micro(batch, is_last, is_empty, 0.0 if is_empty else scale, samples)
        seed_place(Place.UPDATE, self.seed, self.device, step)  # alike on all ranks, which had other micro-batches
        self.position.enter("parameter update")

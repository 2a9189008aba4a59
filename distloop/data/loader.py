"""From a data set to checked batches on the device, in the sampler's order."""

import atexit
import functools
import itertools
import os
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from typing import cast as cast_type

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader

import distloop
from distloop.config.registry import named_modules
from distloop.config.settings import Config, Data
from distloop.data.bad_samples import listed, without_bad
from distloop.data.batches import inputs_of, targets_of, to_model
from distloop.data.datasets import DataSource, class_names
from distloop.data.lengths import refuse_other_length
from distloop.data.now import now_at, tell
from distloop.data.order import MicroBatch, MicroBatchSampler, Part, Plan
from distloop.data.seeded import ChecksBatches, SeededDataset, check_of, collate_of, identity, name_of, no_check
from distloop.data.seeding import Place, seed_forward, seed_place
from distloop.data.tokens import Tokens
from distloop.data.whole_batches import batches_together, gives_batches, takes_rows
from distloop.data.workers import leave_signals_to_parent, signals_blocked, start_forkserver
from distloop.errors import UsageError
from distloop.ranks.environment import cpus_per_rank
from distloop.ranks.leaving import kill_workers
from distloop.ranks.places import Position

ALIGNED_BYTES = 64  # torch's tensors begin at multiples of it


class Loader:
    """Iterates over the batches of a prepared DataLoader and calls `finish` on each."""

    def __init__(self, loader: Any, finish: Callable[[Any], Any]) -> None:
        self.loader, self.finish = loader, finish

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        with signals_blocked():  # workers start with the first batch
            first = list(itertools.islice(batches, 1))
        yield from map(self.finish, itertools.chain(first, batches))


def offers_to_model(example: Any, source: DataSource) -> dict[str, Any]:
    """The data's properties that a model may take as arguments: input_shape, num_classes, num_outputs, if known."""
    offers: dict[str, Any] = {}
    if classes := class_names(source):
        offers["num_classes"] = offers["num_outputs"] = len(classes)
    if isinstance(source.train, Tokens) and source.train.vocabulary:  # tokens have no names
        offers["num_classes"] = offers["num_outputs"] = source.train.vocabulary
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
    `skips`: samples that cannot be loaded are left out, and each item is (batch, list of them), where they were loaded:
    a step's batches are all there before the first is used, which may be more than the device holds."""
    workers = worker_count(config, dataset)
    loader = DataLoader(
        SeededDataset(
            dataset, seed, collate_of(config), check_of(task, dataset), name_of(dataset, source, config), skips
        ),
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
        loader, device=device, num_processes=1, process_index=0, put_on_device=not skips, non_blocking=True
    )

    def finish(batch: Any) -> Any:
        return None if batch is None else to_model(batch, source, dtype, device)

    return Loader(prepared, identity if skips else finish)


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


def _is_own(code: types.CodeType) -> bool:
    """True for the loop of distloop's own train.py."""
    return os.path.realpath(code.co_filename) == os.path.join(
        os.path.realpath(os.path.dirname(distloop.__file__)), "train.py"
    )


def _to_device(batch: Any, source: DataSource, dtype: torch.dtype, device: torch.device) -> Any:
    return to_model(send_to_device(batch, device, non_blocking=True), source, dtype, device)


def _apart(loader: Loader, sampler: MicroBatchSampler) -> Iterator[tuple[torch.Tensor, ...]]:
    """The micro-batches that the sampler has put together, one by one: views of the same memory, or copies, where such
    a view would not begin as memory of its own does. Matrix products round by where their numbers lie, and a run that
    is continued puts others together."""
    for batch in loader:
        sizes = sampler.sizes.popleft()
        for parts in zip(*(rows.split(sizes) for rows in batch), strict=True):
            yield tuple(part if part.data_ptr() % ALIGNED_BYTES == 0 else part.clone() for part in parts)


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
        """`task`: checks the batches, and is told the step in `task.now`; None: nobody does. `waiting` wraps the
        iterator, to measure how long the loop waits for each batch."""
        self.plan, self.seed, self.device, self.position = plan, config.seed, device, position
        self.task, self.augment = task, getattr(task, "augment_batch", identity)
        self.dataset, self.length = source.train, len(source.train)
        self.counts_samples = task is not None and task.weight == "samples"
        dtype = getattr(torch, config.dtype)
        self.skips, self.bad_samples = config.data.on_bad_sample == "skip", source.bad_samples
        together = 1
        if takes_rows(self.dataset) and check_of(task, self.dataset) is no_check and not self.skips:
            together = batches_together(self.dataset, plan.micro_batch_size)
        self.sampler = MicroBatchSampler(plan, first_step, together)
        self.weight = "samples" if task is None else task.weight
        # Where all code is distloop's own, steps draw from torch alone: to seed the others too is 1 % of a small step.
        self.draws_from_torch = not named_modules(config) and position.code is not None and _is_own(position.code)
        self.name = name_of(source.train, source, config.data)
        self._finish = (
            functools.partial(_to_device, source=source, dtype=dtype, device=device) if self.skips else identity
        )
        kind = (config.seed, device, dtype, source.train, self.sampler)
        loader = make_loader(config.data, source, task, *kind, skips=self.skips)
        batches = loader if together == 1 else _apart(loader, self.sampler)
        self.batches = waiting(batches)  # one iterator through all epochs: loader workers start once
        self.tell_task(first_step)  # for passes before the first step

    def rehearsal(self) -> tuple[list[Any], int]:
        """The first micro-batch, its first half, and that half twice in one batch: loaded before those of the steps,
        and in addition to them; and the first one's number of samples. None in the place of a half that cannot be
        loaded alone. Call it before of_step()."""
        self.sampler.rehearses = True
        asked_for = self.sampler.rehearsal()
        items = list(itertools.islice(self.batches, len(asked_for)))
        samples = len(asked_for[0].indices)
        if self.skips:
            samples = max(1, samples - len(items[0][1]))
            items = [item and self._finish(item[0]) for item in items]
        return items, samples

    def of_step(self, step: int) -> Iterator[Micro]:
        """This rank's micro-batches of `step`, counted from 0, as the task has augmented them; the task is told the
        step. Before each, and after the last one, the global random generators are seeded. Take all of them. Raises
        RuntimeError if the loader is at another step."""
        part: Part
        self.position.start_step(step + 1)
        self.position.samples = lambda: f"{listed(self.plan.indices(part))} of {self.name}"
        if step % self.plan.steps_per_epoch == 0:
            refuse_other_length("train", self.dataset, self.length)
        self.tell_task(step)
        count, loaded = self.plan.sample_count(step), self._loaded(step)
        if self.skips:
            items = list(loaded)
            self.position.enter("counting the samples of all ranks")  # one that still loads its own is behind
            loaded, present = without_bad(items, self.bad_samples, self.plan)
            count = present if self.weight == "samples" else count  # other weights are added up after the last batch
        scale = self.plan.world_size / max(1, count)
        for held, part, present in loaded:
            batch = self._finish(held)
            seed_forward(self.seed, step, part.number, self.device, self.draws_from_torch)
            self.position.enter("forward and backward pass")
            samples = max(1, present) if self.counts_samples else None  # one stands in the place of none
            yield Micro(self.augment(batch), part.is_last, not present, scale if present else 0.0, samples)
        if not self.draws_from_torch:  # alike on all ranks, which had other micro-batches
            seed_place(Place.UPDATE, self.seed, self.device, step)
        self.position.enter("parameter update")

    def tell_task(self, step: int, training: bool = True) -> None:
        """Set `now` of the task."""
        if self.task is not None:
            tell(self.task, now_at(step, self.plan, training))

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

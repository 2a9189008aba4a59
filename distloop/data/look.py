"""A look at some samples before training: the example for the model, the first batch of validation, fingerprints."""

import io
import multiprocessing
import pickle
from collections.abc import Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distloop.config.settings import Config, Data
from distloop.data.batches import send, to_model
from distloop.data.datasets import DataSource
from distloop.data.handles import Watched
from distloop.data.loader import worker_count
from distloop.data.order import FixedBatchSampler, MicroBatch, MicroBatchSampler, Plan
from distloop.data.seeded import ChecksBatches, SeededDataset, check_of, collate_of, identity, name_of, no_check
from distloop.data.workers import leave_signals_to_parent, signals_blocked, start_forkserver
from distloop.errors import UsageError


def look(
    dataset: Dataset, items: Sequence[Any], workers: int, config: Data, device: torch.device | None = None
) -> Iterator[Any]:
    """What `dataset` gives for each of the items, one after the other. `workers`: how many training will have.

    With workers they are loaded in one loader process, or on CUDA, whose workers are no copies of this process, from a
    pickled copy of the data set, at less cost. So what a data set opens at its first sample (files, connections,
    threads) is not opened in a process of which loader workers become copies: they would share it. What is open before
    that, and is read for an item, is refused with UsageError. Without workers they are loaded here, as in training.
    Close the iterator if you do not take all.
    """
    context = None
    if workers:
        dataset = _Sent(dataset)
    if workers and device is not None and device.type == "cuda":
        try:
            dataset, workers = pickle.loads(pickle.dumps(dataset)), 0
        except Exception:  # what a new process can inherit and nobody can copy, such as a lock
            context = "forkserver"
    if workers and (context or multiprocessing.get_start_method()) == "fork":
        dataset = Watched(dataset)
    loader: DataLoader = DataLoader(
        dataset,
        batch_size=None,  # an item of the sampler is looked up as it is
        sampler=items,
        collate_fn=identity,
        num_workers=min(1, workers),
        worker_init_fn=leave_signals_to_parent,
        multiprocessing_context=context,
        timeout=config.timeout_seconds if workers else 0,
    )
    if loader.num_workers:
        start_forkserver(loader.multiprocessing_context)
    with signals_blocked():
        found = iter(loader)
    try:
        yield from found
    except UsageError as error:
        # torch's frames hold error and loader in a circle; one that the collector finds waits 10 s for its process.
        raise error.with_traceback(None) from None


class _Sent(Dataset):
    """A data set whose items have to leave a loader process. One that cannot would be waited for until the timeout."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, item: Any) -> Any:
        loaded = self.dataset[item]
        try:
            _Pickler(io.BytesIO()).dump(loaded)
        except Exception:
            _refuse_what_cannot_be_sent(loaded)
        return loaded


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.requires_grad and not value.is_leaf:
            raise ValueError("a tensor with a history of gradients")  # which ForkingPickler refuses, and this does not
        return NotImplemented


def _refuse_what_cannot_be_sent(loaded: Any) -> None:
    try:
        ForkingPickler.dumps(loaded)  # it can more, and leaves shared memory behind
    except Exception as error:
        raise UsageError(
            f"A batch cannot be sent from a loader process ({type(error).__name__}: {error}). Let the data set and "
            "data.collate give tensors in tuples, lists, dicts or dataclasses, or train with --data.workers 0."
        ) from None


def first_validation_batch(
    config: Config, source: DataSource, task: ChecksBatches, data: Any, sampler: FixedBatchSampler, device: torch.device
) -> tuple[Any, int]:
    """The first batch of the validation set `data` that the sampler gives this rank, or rank 0's if it gives none, on
    `device` in the form that the model takes; and the number of samples that were asked for."""
    first = next(iter(sampler), None) or MicroBatch(0, np.arange(min(sampler.samples, sampler.batch_size)))
    settings = config.data
    name = name_of(data, source, settings)
    dataset = SeededDataset(data, config.seed, collate_of(settings), check_of(task, data), name)
    [batch] = look(dataset, [first], worker_count(settings, data), settings, device)
    batch = to_model(send(batch, device), source, getattr(torch, config.dtype), device)
    return batch, len(first.indices)


def first_training_batch(config: Config, source: DataSource, plan: Plan, step: int, device: torch.device) -> Any:
    """This rank's first micro-batch of the epoch of `step`, whose last step may be a short one, as the plan divides it
    now, on `device` in the form that the model takes. No loader of training has to run for it."""
    settings, skips = config.data, config.data.on_bad_sample == "skip"
    name = name_of(source.train, source, settings)
    dataset = SeededDataset(source.train, config.seed, collate_of(settings), no_check, name, skips)
    first = MicroBatchSampler(plan, step - step % plan.steps_per_epoch).rehearsal()[0]
    [item] = look(dataset, [first], worker_count(settings, source.train), settings, device)
    batch = send(item[0] if skips else item, device)
    return to_model(batch, source, getattr(torch, config.dtype), device)


def example_batch(
    source: DataSource,
    config: Data,
    seed: int,
    dtype: torch.dtype,
    samples: int = 1,
    device: torch.device | None = None,
) -> Any:
    """A batch of the first training samples, on the CPU, in the form that the model takes. `device`: the model's."""
    skips, name = config.on_bad_sample == "skip", name_of(source.train, source, config)
    dataset = SeededDataset(source.train, seed, collate_of(config), no_check, name, skips)
    items = [MicroBatch(0, np.arange(samples))]
    [item] = look(dataset, items, worker_count(config, source.train), config, device)
    return to_model(item[0] if skips else item, source, dtype, torch.device("cpu"))

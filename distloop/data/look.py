"""A look at some samples before training: the example for the model, the first batch of validation, fingerprints."""

import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from distloop.config.settings import Data
from distloop.data.batches import to_model
from distloop.data.datasets import DataSource
from distloop.data.loader import SeededDataset, collate_of, identity, no_check, worker_count
from distloop.data.order import MicroBatch
from distloop.data.workers import leave_signals_to_parent, signals_blocked


def look(
    dataset: Dataset, items: Sequence[Any], workers: int, config: Data, device: torch.device | None = None
) -> Iterator[Any]:
    """What `dataset` gives for each of the items, one after the other. `workers`: how many training will have.

    With workers they are loaded in one loader process, or on CUDA, whose workers are no copies of this process, from a
    pickled copy of the data set, at less cost. So what a data set opens at its first sample (files, connections,
    threads) is not opened in a process of which loader workers become copies: they would share it. Without workers
    they are loaded here, as in training. Close the iterator if you do not take all.
    """
    if workers and device is not None and device.type == "cuda":
        dataset, workers = pickle.loads(pickle.dumps(dataset)), 0
    loader: DataLoader = DataLoader(
        dataset,
        batch_size=None,  # an item of the sampler is looked up as it is
        sampler=items,
        collate_fn=identity,
        num_workers=min(1, workers),
        worker_init_fn=leave_signals_to_parent,
        timeout=config.timeout_seconds if workers else 0,
    )
    with signals_blocked():
        found = iter(loader)
    yield from found


def example_batch(
    source: DataSource,
    config: Data,
    seed: int,
    dtype: torch.dtype,
    samples: int = 1,
    device: torch.device | None = None,
) -> Any:
    """A batch of the first training samples, on the CPU, in the form that the model takes. `device`: the model's."""
    dataset = SeededDataset(source.train, seed, collate_of(config), no_check)
    items = [MicroBatch(0, np.arange(samples))]
    [batch] = look(dataset, items, worker_count(config, source.train), config, device)
    return to_model(batch, source, dtype)

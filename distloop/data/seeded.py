"""Micro-batches of a data set: each sample is loaded under its own random numbers, then they are brought together and
checked."""

import copy
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import Dataset, default_collate

from distloop.config.registry import import_callable
from distloop.config.settings import Data
from distloop.data.bad_samples import BadSample, listed, load_samples
from distloop.data.datasets import DataSource
from distloop.data.halves import VALIDATION, halves, word_of
from distloop.data.lengths import in_words
from distloop.data.now import Now
from distloop.data.order import Half, MicroBatch
from distloop.data.seeding import Place, seed_building, seed_sample, uniforms
from distloop.data.whole_batches import gives_batches, takes_rows
from distloop.errors import UsageError, add_note


class ChecksBatches(Protocol):
    """The part of a task that the loader uses: see distloop.tasks.Task."""

    @property
    def checks_targets_only(self) -> bool: ...

    @property
    def weight(self) -> str: ...

    now: Now

    def check(self, batch: Any, indices: Any) -> None: ...


class SeededDataset(Dataset):
    """A data set whose items are whole micro-batches.

    A sample's random numbers depend on (seed, epoch, index), not on the process, worker or batch that loads it. Data
    sets that give whole batches (WholeBatches) get the numbers as an argument. For others the global generators of
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
        self.gives_batches = gives_batches(dataset)
        self.name, self.skips = name, skips
        self.draws_nothing = takes_rows(dataset) and check is no_check

    def __reduce__(self) -> Any:
        """For loader processes that are not forked: they import the user's module as they unpickle the data set. It
        then draws what it drew in load_data(), since the seed is unpickled before the data set."""
        return _unpickled, (SeedFirst(self.seed), self.dataset, self.collate, self.check, self.name, self.skips)

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
        bad: list[BadSample] = []
        place = "batch()"
        try:
            if self.gives_batches:
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
        except StopIteration as error:  # it would end the epoch without a word
            raise RuntimeError(f"data.collate raised {in_words(error)}") from error
        except (RuntimeError, TypeError, ValueError) as error:
            if self.collate is not default_collate:
                raise
            if "negative" in str(error):
                raise UsageError(
                    f"Samples {indices.tolist()[:5]}: an array in reversed order, such as array[::-1], cannot become a "
                    "tensor. Give a copy from __getitem__: array[::-1].copy()."
                ) from None
            raise UsageError(
                f"Samples {indices.tolist()[:5]} and the rest of their batch do not go together: {error}\n"
                "Give all samples one form, or name a function of your own with data.collate."
            ) from None


class SeedFirst:
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


def collate_of(config: Data) -> Callable[[list], Any]:
    """The config's collate function, or PyTorch's."""
    return import_callable("data.collate", config.collate) if config.collate else default_collate


def name_of(dataset: Any, source: DataSource, config: Data) -> str:
    """Which half of the data this is, in words."""
    word = next((word_of(half) for half, each in halves(source).items() if each is dataset), VALIDATION)
    return f"the {word} data (data.name = {config.name!r})"


def check_of(task: ChecksBatches | None, dataset: Any) -> Callable[..., None]:
    """The check of the data set's batches; none of targets in memory, all of which try_out() has checked."""
    if task is None or (takes_rows(dataset) and task.checks_targets_only):
        return no_check
    if isinstance(task, nn.Module) and any(parameter.is_cuda for parameter in task.parameters()):
        return copy.deepcopy(task).cpu().check  # a loader process gets no tensors of a GPU
    return task.check

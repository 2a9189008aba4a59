"""The order of samples and its division into steps and micro-batches: plain functions of integers.

The samples of a step depend on the seed, the number of samples and the global batch only. The world size and the
accumulation decide which rank takes which slice of them.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distloop.data.seeding import derive, hashes
from distloop.errors import UsageError

if TYPE_CHECKING:  # plain functions of integers: nothing here knows of torch
    from distloop.config.settings import Config
    from distloop.ranks.ranks import Ranks

EXACT_LIMIT = 2**20  # up to so many samples the whole permutation is in memory (8 MiB); above, it comes in chunks
CHUNK = 2**16  # positions: numpy needs long arrays to be fast
ROUNDS = 8


class Order:
    """The shuffled order of each epoch: order(epoch, start, stop) -> indices."""

    def __init__(self, samples: int, seed: int) -> None:
        self.samples, self.seed = samples, seed
        self._cached: tuple[int, int] | None = None  # (epoch, chunk) of the part below
        self._part: NDArray[np.int64] = np.empty(0, np.int64)

    def __call__(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """The sample indices at positions start ≤ p < stop of the epoch's order, int64 [stop - start]."""
        if not 0 <= start <= stop <= self.samples:
            raise IndexError(f"positions {start}:{stop} of {self.samples} samples")
        size = self.samples if self.samples <= EXACT_LIMIT else CHUNK
        pieces = []
        while start < stop:
            chunk, offset = divmod(start, size)
            pieces.append(self._chunk(epoch, chunk, size)[offset : offset + stop - start])
            start += len(pieces[-1])
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def _chunk(self, epoch: int, chunk: int, size: int) -> NDArray[np.int64]:
        if self._cached != (epoch, chunk):
            key = derive(self.seed, epoch)
            positions = np.arange(chunk * size, min((chunk + 1) * size, self.samples))
            if self.samples <= EXACT_LIMIT:
                self._part = np.argsort(hashes([key], positions)[0], kind="stable")
            else:
                self._part = permuted(positions, self.samples, key)
            self._cached = (epoch, chunk)
        return self._part


def permuted(positions: NDArray[np.int64], samples: int, key: int) -> NDArray[np.int64]:
    """The images of `positions` under a bijection of {0 … samples-1} that depends on `key`; same shape.

    A Feistel network over a power of two, applied again to results that are not below `samples` (cycle-walking; Black
    and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    bits = max(2, (samples - 1).bit_length())
    images = _feistel(positions.astype(np.uint64), bits, key)
    outside = np.flatnonzero(images >= samples)
    while outside.size:
        images[outside] = _feistel(images[outside], bits, key)
        outside = outside[images[outside] >= samples]
    return images.astype(np.int64)


def _feistel(values: NDArray[np.uint64], bits: int, key: int) -> NDArray[np.uint64]:
    """A keyed bijection of the integers below 2**bits, whose halves may differ by one bit."""
    left_bits, right_bits = bits - bits // 2, bits // 2
    left, right = values >> np.uint64(right_bits), values & np.uint64((1 << right_bits) - 1)
    for round_number in range(ROUNDS):
        # The halves change places, and sizes, each round; after an even number they are back.
        scrambled = hashes([derive(key, round_number)], right.view(np.int64))[0] & np.uint64((1 << left_bits) - 1)
        left, right = right, left ^ scrambled
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


class MicroBatch(NamedTuple):
    """An item of a sampler: the indices of samples, and the epoch, on which their augmentation depends."""

    epoch: int
    indices: NDArray[np.int64]


class Half(MicroBatch):
    """A part of a micro-batch, for the rehearsal: None stands for one that cannot be loaded alone."""

    __slots__ = ()


class Part(NamedTuple):
    """One micro-batch of one rank: positions start ≤ p < stop of the epoch's order, none if both are equal."""

    step: int
    number: int  # its place in the global batch
    start: int
    stop: int
    is_last: bool  # of this rank's in the step


class Plan:
    """The division of an epoch's positions into steps, and of a step into micro-batches of the ranks. Raises UsageError
    if the world size does not divide the global batch, or there are too few samples."""

    def __init__(
        self,
        samples: int,
        global_batch_size: int,
        world_size: int = 1,
        micro_batch_size: int | None = None,
        remainder: Literal["drop", "train"] = "drop",
        *,
        total_steps: int = 0,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        if global_batch_size % world_size:
            lower = global_batch_size // world_size * world_size
            upper = lower + world_size
            near = upper if lower == 0 or upper - global_batch_size <= global_batch_size - lower else lower
            raise UsageError(
                f"batch.global_size = {global_batch_size} cannot be divided among {world_size} processes; "
                f"the nearest that can is {near}: --batch.global-size {near}"
            )
        if samples == 0:
            raise UsageError("The training data is empty: there is nothing to train on.")
        if samples < global_batch_size and remainder == "drop":
            raise UsageError(
                f"batch.global_size = {global_batch_size} is more than the {samples} training samples; "
                f"lower it, or set batch.remainder: train."
            )
        self.samples, self.global_batch_size, self.world_size = samples, global_batch_size, world_size
        self.divide(micro_batch_size)
        whole, rest = divmod(samples, global_batch_size)
        self.steps_per_epoch = whole + (rest > 0 and remainder == "train")
        self.total_steps, self.rank = total_steps, rank
        self.order = Order(samples, seed)

    @classmethod
    def of(cls, config: Config, samples: int, ranks: Ranks) -> Plan:
        """The plan of the config's run for this rank, with so many training samples."""
        batch, place = config.batch, {"rank": ranks.rank, "seed": config.seed}
        limit = None if batch.micro_size == "auto" else batch.micro_size  # found before the first step
        plan = cls(samples, batch.global_size, ranks.world_size, limit, batch.remainder, **place)
        plan.total_steps = plan.steps_of(config)
        plan.is_divided = batch.micro_size != "auto"
        return plan

    def divide(self, micro_batch_size: int | None) -> None:
        """Divide a rank's share of a step into the least number of equal micro-batches, none larger than this. Not once
        a loader has taken batches."""
        self.accumulation = accumulation_steps(self.global_batch_size // self.world_size, micro_batch_size)
        self.micro_batch_size = self.global_batch_size // (self.world_size * self.accumulation)
        self.is_divided = True

    def steps_of(self, config: Config) -> int:
        """The steps of the config's whole run."""
        return config.train.steps or (config.train.epochs or 0) * self.steps_per_epoch

    def span(self, step: int) -> tuple[int, int, int]:
        """(epoch, start, stop): the positions of `step`'s global batch in that epoch's order."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        start = step_of_epoch * self.global_batch_size
        return epoch, start, min(start + self.global_batch_size, self.samples)

    def sample_count(self, step: int) -> int:
        """The number of samples of `step`, over all ranks."""
        _, start, stop = self.span(step)
        return stop - start

    def window(self, step: int, rank: int) -> list[Part]:
        """`rank`'s micro-batches in `step`.

        Micro-batch m of rank r is part m·W + r of the global batch, so that micro-batches of one size hold the same
        samples for any number of ranks. A short last step of an epoch is divided evenly; if it has fewer samples than
        ranks, some parts are empty.
        """
        _, start, stop = self.span(step)
        size = stop - start
        parts = -(-size // (self.micro_batch_size * self.world_size)) * self.world_size
        borders = [start - (-size * part // parts) for part in range(parts + 1)]  # rounded up: the first is never empty
        return [
            Part(step, part, borders[part], borders[part + 1], part + self.world_size >= parts)
            for part in range(rank, parts, self.world_size)
        ]

    def indices(self, part: Part) -> NDArray[np.int64]:
        """The indices of the samples of a micro-batch, int64 [part.stop - part.start]."""
        return self.order(self.span(part.step)[0], part.start, part.stop)


def accumulation_steps(rank_batch_size: int, micro_batch_size: int | None) -> int:
    """The least number of equal micro-batches, none larger than `micro_batch_size`, that make a rank's batch."""
    size, limit = rank_batch_size, micro_batch_size or rank_batch_size
    return next(parts for parts in range(1, size + 1) if size % parts == 0 and size // parts <= limit)


class MicroBatchSampler:
    """This rank's micro-batches from step `start` to the plan's end, as a DataLoader's batch_sampler.

    One iteration runs through all epochs, so that loader workers start once. An empty part gets the step's first
    sample, with weight zero, since DDP needs a backward pass. `parts` holds those of the micro-batches that the loader
    has taken and the loop has not. Up to `together` micro-batches of an epoch, one after the other, make one item;
    `sizes` holds theirs, for each item that the loader has taken and nobody has divided; nothing, if `together` is 1.
    """

    def __init__(self, plan: Plan, start: int, together: int = 1) -> None:
        self.plan, self.start, self.together = plan, start, together
        self.parts: collections.deque[Part] = collections.deque()
        self.sizes: collections.deque[list[int]] = collections.deque()
        self.rehearses = False  # True: begin with those of rehearsal()

    def __iter__(self) -> Iterator[MicroBatch]:
        for items in self._items():
            if self.together == 1:
                yield items[0]
                continue
            self.sizes.append([len(item.indices) for item in items])
            yield MicroBatch(items[0].epoch, np.concatenate([item.indices for item in items]))

    def _items(self) -> Iterator[list[MicroBatch]]:
        if self.rehearses:
            yield from ([item] for item in self.rehearsal())
        steps = range(self.start, self.plan.total_steps)
        parts = (part for step in steps for part in self.plan.window(step, self.plan.rank))
        for _, of_epoch in itertools.groupby(parts, lambda part: part.step // self.plan.steps_per_epoch):
            while some := list(itertools.islice(of_epoch, self.together)):
                self.parts.extend(some)
                yield [self._item(part) for part in some]

    def rehearsal(self) -> list[MicroBatch]:
        """This rank's first micro-batch, its first half, and that half twice in one batch."""
        whole = self._item(self.plan.window(self.start, self.plan.rank)[0])
        half = whole.indices[: max(1, len(whole.indices) // 2)]
        return [whole, Half(whole.epoch, half), Half(whole.epoch, np.concatenate([half, half]))]

    def _item(self, part: Part) -> MicroBatch:
        epoch, first, _ = self.plan.span(part.step)
        is_empty = part.start == part.stop
        span = (first, first + 1) if is_empty else (part.start, part.stop)
        return MicroBatch(epoch, self.plan.order(epoch, *span))


class FixedBatchSampler:
    """Batches for validation, in the data's own order; rank r takes batches r, r + W, …"""

    def __init__(self, samples: int, batch_size: int, rank: int, world_size: int) -> None:
        self.samples, self.batch_size, self.rank, self.world_size = samples, batch_size, rank, world_size

    @property
    def batches(self) -> int:
        """The number of batches of all ranks."""
        return -(-self.samples // self.batch_size)

    def span(self, position: int) -> tuple[int, int]:
        """(start, stop) of this rank's batch number `position`."""
        start = (self.rank + position * self.world_size) * self.batch_size
        return start, min(start + self.batch_size, self.samples)

    def size(self, position: int) -> int:
        """The number of samples of this rank's batch number `position`."""
        start, stop = self.span(position)
        return stop - start

    def __iter__(self) -> Iterator[MicroBatch]:
        for position in range(len(range(self.rank, self.batches, self.world_size))):
            yield MicroBatch(0, np.arange(*self.span(position)))

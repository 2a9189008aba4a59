"""Random numbers as functions of (seed, epoch, index) or (seed, step, position), without any state.

So a checkpoint needs no generator's state, and a run draws the same numbers after a resume and on any number of
processes. The mixing function is SplitMix64's finaliser (Steele, Lea and Flood 2014, "Fast splittable pseudorandom
number generators") in exact integer arithmetic: no library's version changes the numbers.
"""

import contextlib
import enum
import random
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def derive(*parts: int) -> int:
    """A 64-bit hash of `parts`, which depends on their order."""
    state = 0
    for part in parts:
        state = (state + (part & _MASK) + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * _MIX_1) & _MASK
        state = ((state ^ (state >> 27)) * _MIX_2) & _MASK
        state ^= state >> 31
    return state


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The mixing function of derive() for an array, in place; returns the array."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(_MIX_1)
    values ^= values >> np.uint64(27)
    values *= np.uint64(_MIX_2)
    values ^= values >> np.uint64(31)
    return values


def hashes(keys: list[int], values: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A 64-bit hash of each pair of a key and a value: shape [len(keys), len(values)]."""
    first = np.array([(key + _GOLDEN) & _MASK for key in keys], dtype=np.uint64)
    second = np.array([derive(key) for key in keys], dtype=np.uint64)
    mixed = mix(values.astype(np.uint64) + first[:, None])
    mixed += second[:, None]  # a second round with another key, so that nearby keys and values give unrelated numbers
    return mix(mixed)


def uniforms(seed: int, epoch: int, indices: NDArray[np.int64], draws: int) -> NDArray[np.float64]:
    """Numbers in [0, 1) for augmentation, [len(indices), draws]. A row depends on seed, epoch and its index alone."""
    if not draws:
        return np.empty((len(indices), 0))
    keys = [derive(seed, epoch, draw) for draw in range(draws)]
    return (hashes(keys, indices) >> np.uint64(11)).T / 2.0**53  # the 53 bits of a float64, so that none is 1.0


class Place(enum.IntEnum):
    """Where a user's code may draw. Each place has numbers of its own: what one draws does not shift another."""

    FORWARD = 0xD0  # and loss and backward pass, of a micro-batch
    UPDATE = 0xD1  # after a step's last micro-batch
    VALIDATION = 0xD2  # a batch of it: forward pass, loss, metrics, guesses
    SUMMARY = 0xD3
    TRIAL = 0xD4  # a pass of which nothing stays
    DATA, TASK, MODEL = 0xD5, 0xD6, 0xD7  # building them; the modules of the user's are imported there
    REST = 0xD8  # what a loop of the user's own builds


def seed_sample(seed: int, epoch: int, index: int) -> None:
    """Seed the global generators for a sample, and for the collate function after the last sample of a batch."""
    value = derive(seed, epoch, index)
    _seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(value)


def seed_place(
    place: Place, seed: int, device: torch.device, number: int = 0, position: int = 0, of_torch_only: bool = False
) -> None:
    """Seed the global generators, `device`'s among them, for code that runs in this place. `number`: of the step or the
    batch; `position`: the micro-batch's place in the global batch. `of_torch_only`: leave those of numpy and random."""
    value = derive(seed, number, position, place)
    _seed(value, of_torch_only)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(value)
    elif device.type == "mps":
        torch.mps.manual_seed(value)


def seed_forward(seed: int, step: int, position: int, device: torch.device, of_torch_only: bool = False) -> None:
    """Seed the global generators for forward pass (dropout), loss and backward pass of a micro-batch."""
    seed_place(Place.FORWARD, seed, device, step, position, of_torch_only)


def _seed(value: int, of_torch_only: bool = False) -> None:
    torch.default_generator.manual_seed(value)  # 100 times cheaper than torch.manual_seed
    if not of_torch_only:
        np.random.seed(value & 0xFFFFFFFF)
        random.seed(value)


def seed_building(place: Place, seed: int) -> None:
    """Seed the global generators, those of all devices among them, before the data, the task or the model is built."""
    value = derive(seed, 0, 0, place)
    _seed(value)
    torch.manual_seed(value)  # also of devices that are not in use yet


@contextlib.contextmanager
def building(place: Place, seed: int | None) -> Iterator[None]:
    """Seed the global generators for what is built, and once more at the end: what a loop of the user's own builds
    next does not depend on how many numbers were drawn. Without a seed, leave them alone."""
    if seed is not None:
        seed_building(place, seed)
    yield
    if seed is not None:
        seed_building(Place.REST, seed)


@contextlib.contextmanager
def generators_restored() -> Iterator[None]:
    """Restore the global generators at the end: what was drawn meanwhile shifts nothing."""
    states = torch.default_generator.get_state(), np.random.get_state(), random.getstate()
    device = torch.cuda.default_generators[torch.cuda.current_device()] if torch.cuda.is_initialized() else None
    state = None if device is None else device.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if device is not None and state is not None:
            device.set_state(state)

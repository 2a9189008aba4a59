"""Random numbers as functions of (seed, epoch, index) or (seed, step, position), without any state.

So a checkpoint needs no generator's state, and a run draws the same numbers after a resume and on any number of
processes. The mixing function is SplitMix64's finaliser (Steele, Lea and Flood 2014, "Fast splittable pseudorandom
number generators") in exact integer arithmetic: no library's version changes the numbers.
"""

import contextlib
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
    keys = [derive(seed, epoch, draw) for draw in range(draws)]
    return (hashes(keys, indices) >> np.uint64(11)).T / 2.0**53  # the 53 bits of a float64, so that none is 1.0


def seed_sample(seed: int, epoch: int, index: int) -> None:
    """Seed the global generators from which a sample's transforms draw: torch (CPU), numpy, random."""
    value = derive(seed, epoch, index)
    torch.default_generator.manual_seed(value)  # 100 times cheaper than torch.manual_seed
    np.random.seed(value & 0xFFFFFFFF)
    random.seed(value)


def seed_forward(seed: int, step: int, position: int, device: torch.device) -> None:
    """Seed torch's generators for a forward pass (dropout). `position`: the micro-batch's place in the global batch."""
    value = derive(seed, step, position, 0xD0)
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(value)
    elif device.type == "mps":
        torch.mps.manual_seed(value)


@contextlib.contextmanager
def generators_restored() -> Iterator[None]:
    """Restore the global generators of the CPU at the end, since loading a sample seeds them."""
    states = torch.default_generator.get_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.default_generator.set_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])

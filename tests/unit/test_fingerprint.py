"""A user's own data set is known by its length and the contents of some samples, whatever they consist of."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from distloop.config.settings import Data
from distloop.data import fingerprint as module
from distloop.data.datasets import DataSource
from distloop.data.fingerprint import fingerprint, fingerprint_of, is_other


class Pair(NamedTuple):
    inputs: Any
    targets: Any


@dataclasses.dataclass
class Record:
    inputs: Any


class Samples:
    """So many samples, as `make` makes each of its index."""

    def __init__(self, make: Callable[[int], Any], samples: int = 20) -> None:
        self.make, self.samples, self.loaded = make, samples, list[int]()

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Any:
        self.loaded.append(index)
        return self.make(index)


def picture(value: int) -> Image.Image:
    return Image.fromarray(np.full((2, 3), value, dtype=np.uint8))


KINDS: dict[str, Callable[[int], Any]] = {
    "a tensor": lambda value: torch.tensor([0.5, value]),
    "a tensor of no dimension": torch.tensor,
    "a strided tensor": lambda value: torch.full((2, 3), value).T,
    "half precision": lambda value: torch.tensor([value], dtype=torch.bfloat16),
    "a conjugate view": lambda value: torch.tensor([complex(1, value)]).conj(),
    "an array": lambda value: np.array([[value, 1]], dtype=np.int16),
    "an array of text": lambda value: np.array(["a", str(value)], dtype=object),
    "a number of NumPy": np.float32,
    "an integer": int,
    "text": lambda value: f"\udc80 {value}",
    "bytes": lambda value: bytes([value]),
    "a picture": picture,
    "nested": lambda value: {"inputs": [torch.ones(2), (None, value)], "targets": True},
    "a named tuple": lambda value: Pair(torch.ones(2), value),
    "a dataclass": lambda value: Record(np.array(value)),
    "another key": lambda value: {f"key {value}": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_any_kind_are_told_apart(kind: str) -> None:
    make = KINDS[kind]
    known = fingerprint(Samples(make))
    assert known == fingerprint(Samples(make))
    assert not is_other(known, fingerprint(Samples(make)))
    assert all(digest.isalnum() for digest in known["contents"].values())
    assert len(set(known["contents"].values())) == len(known["contents"]) == 8
    assert is_other(known, fingerprint(Samples(lambda index: make(19 - index))))


def test_the_form_of_a_sample_counts_as_well_as_its_bytes() -> None:
    zeros: list[Any] = [
        torch.zeros(4),
        torch.zeros(2, 2),
        torch.zeros(4, dtype=torch.int32),
        np.zeros(4, "f4"),
        [0.0] * 4,
    ]
    digests = [fingerprint([zero, zero])["contents"]["0"] for zero in zeros]
    assert len(set(digests)) == 5


@pytest.mark.parametrize(
    ("samples", "indices"), [(1, [0]), (5, [0, 1, 2, 3, 4]), (99, [0, 14, 28, 42, 56, 70, 84, 98])]
)
def test_some_samples_are_loaded_from_the_first_to_the_last(samples: int, indices: list[int]) -> None:
    dataset = Samples(int, samples)
    assert list(fingerprint(dataset)["contents"]) == [str(index) for index in indices]
    assert sorted(set(dataset.loaded)) == indices


def test_of_a_slow_data_set_fewer_samples_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.0)
    known = fingerprint(Samples(int))
    assert list(known["contents"]) == ["19"]  # the last one: whether the data end before their length
    monkeypatch.undo()
    assert not is_other(known, fingerprint(Samples(int)))
    assert is_other(known, fingerprint(Samples(lambda index: index + 1)))


def draw_from_all(_: int) -> Any:
    return torch.rand(2), np.random.normal(), random.random()


def test_augmented_samples_are_the_same_again_and_leave_the_generators_as_they_were() -> None:
    draw_from_all(0)
    states = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    known = fingerprint(Samples(draw_from_all))
    assert all(digest.isalnum() for digest in known["contents"].values())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert str(np.random.get_state()) == states[1]
    assert random.getstate() == states[2]
    draw_from_all(0)
    assert fingerprint(Samples(draw_from_all)) == known


def raising(index: int) -> int:
    raise OSError("gone")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda index: np.random.default_rng().random(), "differs under the same seed"),
        (lambda index: object(), ""),
        (raising, "raises OSError"),
    ],
)
def test_samples_that_say_nothing_of_the_data_do_not_keep_a_run_from_going_on(make: Any, said: str) -> None:
    known = fingerprint(Samples(make))
    assert all(digest.startswith(said) and not digest.isalnum() for digest in known["contents"].values())
    assert not is_other(known, fingerprint(Samples(make)))
    assert not is_other(known, fingerprint(Samples(int)))
    assert not is_other(fingerprint(Samples(int)), known)


def test_a_checkpoint_without_contents_fits_samples_of_any_contents() -> None:
    assert not is_other({"samples": 20}, fingerprint(Samples(int)))
    assert is_other({"samples": 20}, fingerprint(Samples(int, 21)))
    assert is_other({"samples": 20, "sha256": "0"}, fingerprint(Samples(int)))


@pytest.mark.parametrize(("workers", "device"), [(0, "cpu"), (2, "cpu"), (2, "cuda")])
def test_samples_are_loaded_where_training_loads_them_and_once(workers: int, device: str) -> None:
    dataset = Samples(int)
    source, config = DataSource(dataset, dataset), Data(workers=workers)
    known = fingerprint_of(source, "train", config, torch.device(device))
    assert known["contents"] == fingerprint(Samples(int))["contents"]
    assert bool(dataset.loaded) == (workers == 0), "no file of the user's is opened by what loader processes copy"
    loaded = len(dataset.loaded)
    assert fingerprint_of(source, "train", config, torch.device(device)) is known
    assert len(dataset.loaded) == loaded

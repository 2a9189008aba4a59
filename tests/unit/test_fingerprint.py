"""A user's own data set is known by its length and the contents of some samples, whatever they consist of."""

from __future__ import annotations

import dataclasses
import multiprocessing
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from distloop.config.settings import Data
from distloop.data import fingerprint as module
from distloop.data.datasets import DataSource
from distloop.data.fingerprint import fingerprint, fingerprint_of, is_other, without_errors
from distloop.data.whole_batches import WholeBatches


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
    [(lambda index: np.random.default_rng().random(), "differs under the same seed"), (raising, "raises OSError")],
)
def test_samples_that_say_nothing_of_the_data_do_not_keep_a_run_from_going_on(make: Any, said: str) -> None:
    known = fingerprint(Samples(make))
    assert all(digest.startswith(said) and not digest.isalnum() for digest in known["contents"].values())
    assert not is_other(known, fingerprint(Samples(make)))
    assert not is_other(known, fingerprint(Samples(int)))
    assert not is_other(fingerprint(Samples(int)), known)


class Unreadable:
    """A value that has no bytes."""


def test_a_part_without_bytes_does_not_hide_the_others() -> None:
    known = fingerprint(Samples(lambda index: (torch.tensor(index), Unreadable(), {index})))
    assert known == fingerprint(Samples(lambda index: (torch.tensor(index), Unreadable(), {index})))
    assert is_other(known, fingerprint(Samples(lambda index: (torch.tensor(index + 1), Unreadable(), {index}))))


class Reversed(WholeBatches):
    """Gives whole batches, of which the order may be another one; samples alone cannot be had."""

    def __init__(self, sign: int) -> None:
        self.sign = sign

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> None:
        raise NotImplementedError

    def batch(self, indices: NDArray[np.int64], random: NDArray[np.float64]) -> Any:
        return torch.tensor(self.sign * indices)


def test_a_data_set_of_whole_batches_is_known_by_what_batch_gives() -> None:
    known = fingerprint(Reversed(1))
    assert known == fingerprint(Reversed(1))
    assert is_other(known, fingerprint(Reversed(-1)))


def test_where_the_data_lie_is_none_of_their_contents(tmp_path: Path) -> None:
    def of(folder: str, name: str) -> dict[str, Any]:
        root = tmp_path / folder

        def make(index: int) -> Any:
            return index, root / f"{index}.png", f"{root}/{name}"

        return fingerprint(Samples(make), Data(root=str(root), workers=0))

    assert of("here", "a") == of("there", "a")
    assert is_other(of("here", "a"), of("here", "b"))


def test_sums_in_samples_are_rounded_alike_on_any_number_of_threads() -> None:
    numbers = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    known = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        known.append(fingerprint(Samples(lambda index: (numbers * index).sum())))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    assert known[0] == known[1] == known[2]


class WithLock:
    """A data set that a new process can inherit, and that nobody can copy."""

    def __init__(self) -> None:
        self.lock = multiprocessing.get_context("forkserver").Lock()

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> int:
        with self.lock:
            return index


def test_beside_a_gpu_a_data_set_that_cannot_be_copied_is_looked_at_in_a_loader_process() -> None:
    found = fingerprint(WithLock(), Data(workers=1), torch.device("cuda"))
    assert found["contents"] == fingerprint(Samples(int))["contents"]


def test_no_file_keeps_the_words_of_an_error() -> None:
    found = without_errors(fingerprint(Samples(raising)))
    assert set(found["contents"].values()) == {"raises OSError"}
    assert not is_other(found, fingerprint(Samples(int)))


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

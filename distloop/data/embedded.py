"""The data sets that are installed with scikit-learn, read from its folder: to import it would take a second or two."""

import gzip
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distloop.errors import UsageError

Half = tuple[Tensor, Tensor]  # inputs, targets


def digits_halves() -> list[Half]:
    """load_digits() of scikit-learn, as uint8 [samples, 1, 8, 8] and int64 [samples]; the two halves of its
    train_test_split(test_size=0.2, stratify=targets, random_state=0)."""
    rows = _read("digits.csv.gz")
    pixels = torch.from_numpy((rows[:, :-1] * (255 / 16)).round().astype(np.uint8)).reshape(-1, 1, 8, 8)
    targets = rows[:, -1].astype(np.int64)
    labels = torch.from_numpy(targets)
    halves = _split_of_each_class(targets, _validation_count(targets))
    return [(pixels[half], labels[half]) for half in halves]


def diabetes_halves() -> list[Half]:
    """load_diabetes() of scikit-learn, standardised by the training rows: float32 [samples, 10] and [samples, 1]; the
    two halves of its train_test_split(test_size=0.2, random_state=0)."""
    inputs, targets = _read("diabetes_data_raw.csv.gz"), _read("diabetes_target.csv.gz")
    # As scikit-learn scales them, for the rounding of the last bits, by which a run that has begun knows its data.
    inputs = (inputs - inputs.mean(0)) / inputs.std(0) / len(inputs) ** 0.5
    order = np.random.RandomState(0).permutation(len(targets))
    validation, train = np.split(order, [_validation_count(targets)])
    columns = np.concatenate([inputs, targets[:, None]], axis=1)
    columns = (columns - columns[train].mean(0)) / columns[train].std(0)  # statistics of the training rows only
    tensor = torch.from_numpy(columns.astype(np.float32))
    return [(tensor[half, :10], tensor[half, 10:]) for half in (train, validation)]


def _read(name: str) -> np.ndarray[Any, Any]:
    """The numbers of a file of scikit-learn's folder datasets/data, [rows, columns]. Raises UsageError."""
    found = importlib.util.find_spec("sklearn")  # imports nothing
    if found is None or not found.submodule_search_locations:
        raise UsageError(
            "The data sets digits and diabetes come with scikit-learn, which is not installed here: pip "
            "install scikit-learn, or choose other data."
        )
    path = Path(found.submodule_search_locations[0]) / "datasets" / "data" / name
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return np.loadtxt(file, delimiter="," if name.startswith("digits") else None)
    except OSError as error:
        raise UsageError(
            f"The data sets digits and diabetes come with scikit-learn, and its file {path} cannot be read: "
            f"{error.strerror or error}. Install scikit-learn again, or choose other data."
        ) from None


def _validation_count(targets: np.ndarray[Any, Any]) -> int:
    """A fifth, rounded up."""
    return -(-len(targets) // 5)


def _split_of_each_class(targets: np.ndarray[Any, Any], validation: int) -> tuple[np.ndarray[Any, Any], ...]:
    """The training and validation indices of a split in which each class has its share: scikit-learn's
    StratifiedShuffleSplit with the seed 0, draw for draw."""
    random = np.random.RandomState(0)
    counts = np.bincount(targets)
    of_train = _shares(counts, len(targets) - validation, random)
    of_validation = _shares(counts - of_train, validation, random)
    halves: tuple[list[int], list[int]] = ([], [])
    for label, (first, second) in enumerate(zip(of_train, of_validation, strict=True)):
        shuffled = np.flatnonzero(targets == label)[random.permutation(counts[label])]
        halves[0].extend(shuffled[:first])
        halves[1].extend(shuffled[first : first + second])
    return tuple(random.permutation(half) for half in halves)


def _shares(counts: np.ndarray[Any, Any], total: int, random: np.random.RandomState) -> np.ndarray[Any, Any]:
    """`total` samples dealt to the classes in proportion to their counts; those left over to the largest remainders,
    among equal ones by chance."""
    exact = counts / counts.sum() * total
    dealt = np.floor(exact)
    left = int(total - dealt.sum())
    for remainder in sorted(set(exact - dealt), reverse=True):
        if not left:
            break
        (equal,) = np.where(exact - np.floor(exact) == remainder)
        chosen = random.choice(equal, min(len(equal), left), replace=False)
        dealt[chosen] += 1
        left -= len(chosen)
    return dealt.astype(int)

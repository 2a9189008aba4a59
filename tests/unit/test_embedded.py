"""The data sets of scikit-learn, read from its files: the bits that it gives itself, without importing it."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits
from sklearn.model_selection import train_test_split

from distloop.config.settings import Data
from distloop.data import embedded
from distloop.data.datasets import load_data
from distloop.errors import UsageError
from tests.tools.ranks import command


def test_the_digits_are_those_that_scikit_learn_loads_and_splits() -> None:
    images, targets = load_digits(return_X_y=True)
    halves = train_test_split(np.arange(len(targets)), test_size=0.2, stratify=targets, random_state=0)
    pixels = (images * (255 / 16)).round().astype(np.uint8).reshape(-1, 1, 8, 8)
    for (inputs, labels), half in zip(embedded.digits_halves(), halves, strict=True):
        assert (inputs.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert torch.equal(inputs, torch.from_numpy(pixels[half]))
        assert torch.equal(labels, torch.from_numpy(targets[half]))


def test_the_diabetes_rows_are_those_that_scikit_learn_loads_scales_and_splits() -> None:
    inputs, targets = load_diabetes(return_X_y=True)
    halves = train_test_split(np.arange(len(targets)), test_size=0.2, random_state=0)
    columns = np.concatenate([inputs, targets[:, None]], axis=1)
    columns = ((columns - columns[halves[0]].mean(0)) / columns[halves[0]].std(0)).astype(np.float32)
    for (rows, values), half in zip(embedded.diabetes_halves(), halves, strict=True):
        assert (rows.shape[1], values.shape[1]) == (10, 1)
        assert torch.cat([rows, values], 1).numpy().tobytes() == columns[half].tobytes()


def test_scikit_learn_is_not_imported_for_its_data(tmp_path: Path) -> None:
    program = (
        "import sys; from distloop.config.settings import Data; from distloop.data.datasets import load_data\n"
        "sizes = [len(load_data(Data(name)).train) for name in ('digits', 'diabetes')]\n"
        "print(sizes, sorted({'sklearn', 'scipy', 'joblib'} & set(sys.modules)))"
    )
    assert command([sys.executable, "-c", program], tmp_path).stdout.strip() == "[1437, 353] []"


@pytest.mark.parametrize("name", ["digits", "diabetes"])
def test_without_scikit_learn_one_message_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"come with scikit-learn, which is not installed here: pip install"):
        load_data(Data(name))


def test_a_scikit_learn_that_lacks_the_file_is_named_with_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.machinery.ModuleSpec("sklearn", None, is_package=True)
    found.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(UsageError, match=rf"its file {tmp_path}/datasets/data/digits\.csv\.gz cannot be read: No such"):
        load_data(Data("digits"))

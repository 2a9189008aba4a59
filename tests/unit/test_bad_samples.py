"""Which errors are a sample's own, which file it is, and what is kept of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import ConcatDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder

from distloop.config.settings import Data
from distloop.data.bad_samples import MOST_LISTED, BadSample, BadSamples, is_of_the_sample, path_of
from distloop.data.loader import SeededDataset, collate_of, no_check
from distloop.data.order import MicroBatch
from distloop.errors import RunFailed, UsageError
from tests.lab.bad_data import Line, write_pictures


@pytest.mark.parametrize(
    "error",
    [
        OSError("cut off"),
        FileNotFoundError(2, "gone"),
        UnidentifiedImageError("no picture"),
        Image.DecompressionBombError("too large"),
        ValueError("no number"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no text"),
        json.JSONDecodeError("no JSON", "", 0),
        KeyError("no label"),
        EOFError(),
        AssertionError("empty"),
        RuntimeError("of a decoder in C++"),
        SyntaxError("broken PNG file"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_that_a_sample_may_have_of_its_own(error: Exception) -> None:
    assert is_of_the_sample(error)


@pytest.mark.parametrize(
    "error",
    [
        TypeError("None is no picture"),
        NameError("imge"),
        AttributeError("opne"),
        ModuleNotFoundError("cv2"),
        IndexError("beyond the end"),
        StopIteration(),
        NotImplementedError(),
        RecursionError(),
        MemoryError(),
        torch.OutOfMemoryError(),
        UsageError("of distloop"),
        SyntaxError("invalid syntax", ("mine.py", 3, 1, "x = = 1")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_mistakes_in_code_are_no_samples(error: Exception) -> None:
    assert not is_of_the_sample(error)


def test_the_path_of_a_picture_also_in_a_subset_and_a_concatenation(tmp_path: Path) -> None:
    write_pictures(tmp_path, 8, [])
    pictures = ImageFolder(str(tmp_path / "train"))
    plain = TensorDataset(torch.zeros(3))
    both: Any = ConcatDataset([plain, Subset(pictures, [6, 2])])
    assert path_of(pictures, 5) == str(tmp_path / "train" / "dogs" / "001.jpg")
    assert [path_of(both, index) for index in range(5)] == [
        *[""] * 3,
        str(tmp_path / "train" / "dogs" / "002.jpg"),
        str(tmp_path / "train" / "cats" / "002.jpg"),
    ]

    class Quacks:
        samples = (("not a path", 0),)

    assert path_of(Quacks(), 0) == ""


def test_a_batch_of_bad_samples_alone_holds_the_next_good_one() -> None:
    dataset = SeededDataset(Line(20, [18, 19, 0], "OSError"), 0, collate_of(Data()), no_check, skips=True)
    (inputs, _), bad = dataset.__getitems__(MicroBatch(0, np.array([18, 19])))
    assert inputs.tolist() == Line(20, [], "")[1][0][None].tolist()
    assert [each.index for each in bad] == [18, 19]


def test_data_without_a_good_sample_end_the_run() -> None:
    dataset = SeededDataset(Line(20, list(range(20)), "OSError"), 0, collate_of(Data()), no_check, skips=True)
    with pytest.raises(RunFailed, match=r"in a row of the data cannot be loaded, the first of them sample 3: OSError"):
        dataset.__getitems__(MicroBatch(0, np.array([3, 4])))


def test_the_check_of_a_task_is_told_the_samples_that_are_there() -> None:
    told: list[Any] = []

    def check(_: Any, indices: Any) -> None:
        told.extend(indices.tolist())

    dataset = SeededDataset(Line(20, [4], "OSError"), 0, collate_of(Data()), check, skips=True)
    dataset.__getitems__(MicroBatch(0, np.array([3, 4, 5])))
    assert told == [3, 5]


def test_the_list_comes_back_from_json_and_counts_each_sample_once() -> None:
    found = BadSamples()
    assert found.state() == {}
    two = [BadSample(7, "", "OSError: a"), BadSample(3, "x.jpg", "OSError: b")]
    assert [each.index for each in found.add([*two, two[0]], 200)] == [3, 7]
    again = BadSamples()
    again.load(json.loads(json.dumps(found.state())))
    assert (again.indices, again.listed) == ({3, 7}, [two[1], two[0]])
    assert again.add(two, 200) == []
    with pytest.raises(RunFailed, match=re.escape("3 of 200 training samples cannot be loaded, more than 1%")):
        again.add([BadSample(9, "", "OSError: c")], 200)
    again.load({})
    assert again.state() == {}


def test_the_list_has_an_end() -> None:
    found = BadSamples()
    found.add([BadSample(index, "", "OSError") for index in range(MOST_LISTED + 5)], 10**6)
    state = found.state()["bad_samples"]
    assert (len(state["indices"]), len(state["listed"])) == (MOST_LISTED + 5, MOST_LISTED)
    assert found.lines()[-1].endswith(f"and {MOST_LISTED + 5 - 10} more")

"""Numbers, durations and sizes as people read them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from distloop.run.best import is_better
from distloop.tracking import wording


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (wording.number, 0.98061, "0.9806"),
        (wording.number, 12345.6, "12346"),
        (wording.number, [1, 2], "[1, 2]"),
        (wording.number_with_zeros, 0.8, "0.8000"),
        (wording.number_with_zeros, 3e-7, "3e-07"),
        (wording.number_with_zeros, None, "–"),
        (wording.number_with_commas, 12345, "12,345"),
        (wording.number_with_commas, 12345.6, "12346"),
        (wording.number_with_commas, math.nan, "–"),
        (wording.number_with_commas, True, "True"),
        (wording.percent, 0.987, "98.7 %"),
        (wording.percent, 0.9999, "100 %"),
        (wording.percent, math.inf, "–"),
        (wording.duration, 3700.2, "1:01:40"),
        (wording.long_duration, 4.23, "4.2 s"),
        (wording.long_duration, 0.01, "< 0.1 s"),
        (wording.long_duration, 65, "1:05"),
        (wording.long_duration, 76 * 3600, "3 d 4 h"),
        (wording.short_duration, 2e-4, "200 µs"),
        (wording.short_duration, 1.5, "1.5 s"),
        (wording.age, 119.9, "119 s ago"),
        (wording.age, 3 * 86400.0, "3 d ago"),
        (wording.age, None, "–"),
        (wording.file_size, 812_000, "812 kB"),
        (wording.file_size, 1_200_000_000, "1.2 GB"),
        (wording.memory_size, 2**20, "1 MiB"),
    ],
)
def test_a_value_is_written_as_people_read_it(function: Any, value: Any, text: str) -> None:
    assert function(value) == text


@pytest.mark.parametrize(
    ("direction", "new", "old", "better"),
    [
        ("max", 2.0, 1.0, True),
        ("max", 1.0, 2.0, False),
        ("min", 1.0, 2.0, True),
        ("min", 2.0, 1.0, False),
        ("min", 1.0, 1.0, False),
        ("max", 0.0, None, True),
        ("max", 0.0, math.nan, True),
        ("min", math.nan, 1.0, False),
        ("min", math.nan, None, False),
        ("max", math.inf, 1.0, False),
        ("max", None, None, False),
        ("max", [1.0], 0.5, False),
    ],
)
def test_a_number_beats_a_worse_one_and_whatever_is_none(direction: str, new: Any, old: Any, better: bool) -> None:
    assert is_better(("metric", direction), new, old) == better

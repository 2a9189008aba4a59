"""Values that a loop adds to its rows: made plain, refused by name, shown by the console."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distloop.errors import UsageError
from distloop.ranks import sum_over_ranks
from distloop.run.metrics import KEYS_OF_EVERY_ROW, MetricsFile, check_row, own_values, plain_values
from distloop.tracking.live_view import layout
from tests.unit.test_console import TRAIN, VALIDATE, console, progress


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (3, 3),
        (0.5, 0.5),
        (True, True),
        (None, None),
        (np.float32(0.5), 0.5),
        (np.float64(0.25), 0.25),
        (np.int64(7), 7),
        (np.bool_(True), True),
        (np.array(2.0), 2.0),
        (torch.tensor(1.5, dtype=torch.bfloat16), 1.5),
        (torch.tensor(1.5, requires_grad=True), 1.5),
        (torch.tensor(3), 3),
        (torch.tensor(True), True),
        ([1, np.float32(0.5), torch.tensor(2.0)], [1, 0.5, 2.0]),
        ((0.1, 0.2), [0.1, 0.2]),
        ([[1, np.int8(2)], [3, 4]], [[1, 2], [3, 4]]),
    ],
)
def test_numbers_of_any_library_become_pythons(value: Any, plain: Any) -> None:
    found = plain_values("log", {"name": value})["name"]
    assert found == plain
    assert type(found) is type(plain)
    assert json.loads(json.dumps(found)) == plain


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("high", "str"),
        ({"a": 1}, "dict"),
        (torch.zeros(3), r"Tensor of shape \[3\]"),
        (np.zeros((2, 2)), r"ndarray of shape \[2, 2\]"),
        (np.str_("high"), r"str_ of shape \[\]"),
        (1j, "complex"),
        ([1, "high"], "str"),
        ([torch.zeros(1)], r"Tensor of shape \[1\]"),
        (torch.tensor(1j), r"Tensor of shape \[\]"),
    ],
)
def test_anything_else_is_refused_by_name_and_type(value: Any, what: str) -> None:
    with pytest.raises(UsageError, match=rf"^trackers\.log\('train', …\): penalty is a {what}\. A row takes numbers"):
        plain_values("trackers.log('train', …)", {"loss": 1.0, "penalty": value})


@pytest.mark.parametrize("name", KEYS_OF_EVERY_ROW)
def test_what_every_row_has_is_not_replaced(name: str) -> None:
    with pytest.raises(UsageError, match=f"'validate', ….: {name} is a key of its own in every row"):
        check_row("validate", {"accuracy": 0.5, name: 1})


@pytest.mark.parametrize("kind", ["test", "figure", "", "Train"])
def test_a_kind_that_does_not_exist_is_refused_with_those_that_do(kind: str) -> None:
    with pytest.raises(UsageError, match=f"'{kind}', ….: no such kind of row. Known: train, epoch, validate"):
        check_row(kind, {})


def test_a_list_may_have_numbers_that_json_lacks(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.log({"step": 1, "list": [1.0, math.nan, [math.inf]]})
    file.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)["list"] == [1, None, [None]]


# ---- sums ------------------------------------------------------------------------------------------------------------


def test_one_process_reads_what_it_sums() -> None:
    values = {
        "a": 1,
        "b": np.float32(0.5),
        "c": torch.tensor(1 / 3, dtype=torch.float64, requires_grad=True),
        "d": True,
    }
    assert sum_over_ranks(**values) == {"a": 1.0, "b": 0.5, "c": 1 / 3, "d": 1.0}
    assert {type(value) for value in sum_over_ranks(**values).values()} == {float}
    assert sum_over_ranks() == {}


@pytest.mark.parametrize("value", [torch.zeros(2), [1.0], "1", None])
def test_only_numbers_are_summed(value: Any) -> None:
    with pytest.raises(UsageError, match=r"^sum_over_ranks\(\): penalty is a \w+"):
        sum_over_ranks(loss=1.0, penalty=value)


# ---- the console -----------------------------------------------------------------------------------------------------

OWN = {"penalty": 0.25, "rates": [0.1, 0.012345678], "is_odd": True}


def test_own_values_are_those_that_no_row_has_otherwise() -> None:
    assert own_values({**TRAIN, **OWN}) == OWN
    assert own_values(TRAIN) == {}
    assert own_values({**VALIDATE, "samples": 3}) == {"loss": 1.018, "accuracy": 0.8222}


def test_a_train_line_has_own_values_behind_the_known_ones(capsys: pytest.CaptureFixture) -> None:
    console().log({**TRAIN, **OWN, "none": math.nan})
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(" · data wait 2 % · penalty 0.25 · rates [0.1, 0.01235] · is_odd 1 · none nan")


def test_a_train_line_has_as_many_own_values_as_fit(capsys: pytest.CaptureFixture) -> None:
    own = {f"value_{number}": number / 7 for number in range(50)}
    console().log({**TRAIN, **own})
    (line,) = capsys.readouterr().out.splitlines()
    assert "value_0 0" in line
    assert "value_49" not in line
    assert 140 < len(line) <= 160


def test_own_forms_of_known_values_are_shown_as_they_are(capsys: pytest.CaptureFixture) -> None:
    shown = console()
    shown.log({**TRAIN, "lr": [0.1, 0.01], "memory_gib": 0.5})
    assert "lr [0.1, 0.01]" in capsys.readouterr().out
    assert shown.progress.memory() == 0.5


def test_the_live_view_shows_as_many_own_values_as_fit_in_a_line() -> None:
    now = progress()
    now.add(TRAIN)
    before = {columns: len(layout(now, columns)) for columns in (40, 80, 160)}
    now.add({**TRAIN, "penalty": 0.25, **{f"value_{number}": 1.0 for number in range(50)}})
    for columns in before:
        lines = ["".join(text for text, _ in line) for line in layout(now, columns)]
        assert max(map(len, lines)) <= columns
        assert len(lines) == before[columns] + 1
        assert "penalty 0.2500" in "\n".join(lines)

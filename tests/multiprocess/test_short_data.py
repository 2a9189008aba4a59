"""Data that end before their length end the run with one message, not the epoch without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.lab.short import SAMPLES
from tests.multiprocess.test_weights import BASE as WEIGHTS
from tests.multiprocess.test_weights import nothing_is_saved, refused
from tests.tools.ranks import Outcome, train, write_config

LAB = "tests.lab.short"
BASE: dict[str, Any] = {**WEIGHTS, "task": "classification", "train": {"epochs": 2}, "validate": {"batch_size": 20}}
RANKS = pytest.mark.parametrize("world_size", [1, 2])
BOTH = pytest.mark.parametrize(
    ("workers", "world_size"),
    [(0, 2), (2, 1), *(pytest.param(*case, marks=pytest.mark.long) for case in ((0, 1), (2, 2)))],
)
HALVES = pytest.mark.parametrize("half", ["train", "validation"])


def run(folder: Path, data: dict[str, Any], world_size: int = 1, **settings: Any) -> Outcome:
    return train(folder, ["--config", str(write_config(folder, {**BASE, "data": data, **settings}))], world_size)


@BOTH
@HALVES
@pytest.mark.parametrize(("how", "error"), [("index", "IndexError: index 63 is out of"), ("stop", "StopIteration")])
def test_data_without_their_last_sample_are_refused_before_the_first_step(
    tmp_path: Path, how: str, error: str, half: str, workers: int, world_size: int
) -> None:
    data = {"name": f"{LAB}:make_data", "args": {"half": half, "how": how}, "workers": workers}
    outcome = run(tmp_path, data, world_size)
    word = "training" if half == "train" else half
    refused(
        outcome, f"he {word} data have the length {SAMPLES}", "sample 63 raises " + error, "__len__", "short.py, line"
    )
    assert not (tmp_path / "runs").exists()


@BOTH
@HALVES
def test_a_sample_that_is_missing_in_the_middle_is_named_when_it_is_met(
    tmp_path: Path, half: str, workers: int, world_size: int
) -> None:
    """None of the samples that are looked at before the first step is missing."""
    data = {"name": f"{LAB}:with_a_hole", "args": {"half": half}, "workers": workers}
    outcome = run(tmp_path, data, world_size)
    refused(
        outcome, f"have the length {SAMPLES}", "sample 30 raises IndexError: list index out of range", "short.py, line"
    )
    if half == "train":
        nothing_is_saved(tmp_path)


@BOTH
@HALVES
def test_a_batch_with_fewer_rows_is_refused(tmp_path: Path, half: str, workers: int, world_size: int) -> None:
    data = {"name": f"{LAB}:make_data", "args": {"half": half, "how": "batch", "there": 62}, "workers": workers}
    refused(run(tmp_path, data, world_size), "the weight ", "samples. Return sums")


@RANKS
@HALVES
def test_a_length_that_changes_is_named_with_both_numbers(tmp_path: Path, half: str, world_size: int) -> None:
    data = {"name": f"{LAB}:shrinking", "args": {"half": half}, "workers": 0}
    outcome = run(tmp_path, data, world_size, log={"every_steps": 3})
    word = "training" if half == "train" else half
    refused(outcome, f"The {word} data had {SAMPLES} samples", f"and have {SAMPLES // 2} now")


@BOTH
def test_an_iteration_that_a_collate_ends_is_no_short_validation(tmp_path: Path, workers: int, world_size: int) -> None:
    data = {"name": f"{LAB}:make_data", "args": {"half": "train", "there": SAMPLES}, "workers": workers}
    outcome = run(tmp_path, {**data, "collate": f"{LAB}:ends_in_validation"}, world_size)
    assert outcome.codes == [1] * world_size
    assert "data.collate raised StopIteration" in outcome.output


def test_data_that_end_early_on_one_rank_are_named_with_it(tmp_path: Path) -> None:
    outcome = run(tmp_path, {"name": f"{LAB}:on_rank_1", "workers": 0}, 2)
    refused(outcome, "training sample 45 can be loaded on rank 0", "on rank 1", "IndexError")

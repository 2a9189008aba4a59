"""The best of several validations."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distloop.errors import UsageError
from distloop.run.best import Best, is_better
from distloop.training.tasks import Classification, Regression

reproducible = settings(derandomize=True, deadline=None)
values = st.floats() | st.sampled_from([math.nan, math.inf, -math.inf, 0.5, 1.0]) | st.integers(-3, 3)


def best_after(rule: tuple[str, str], *rows: dict[str, Any]) -> dict[str, Any] | None:
    """The best one of these validation rows, each with its step."""
    best = Best(None, rule)
    for row in rows:
        best.update(row["step"], {name: value for name, value in row.items() if name != "step"})
    return best.row


def test_the_better_row_follows_the_tasks_direction_and_the_earlier_one_wins_a_tie() -> None:
    first, second = {"step": 1, "accuracy": 0.5, "loss": 2.0}, {"step": 2, "accuracy": 0.6, "loss": 1.0}
    assert best_after(("accuracy", "max"), first) == first
    assert best_after(("accuracy", "max"), first, second) == second
    assert best_after(("accuracy", "max"), {**second, "step": 1}, {**first, "step": 2}) == {**second, "step": 1}
    assert best_after(("loss", "min"), first, second) == second
    assert best_after(("loss", "min"), first, {**first, "step": 3}) == first


def test_a_validation_that_is_not_a_number_is_never_the_best() -> None:
    lost, good = {"step": 1, "loss": math.nan}, {"step": 2, "loss": 1.0}
    assert best_after(("loss", "min"), lost) is None
    assert best_after(("loss", "min"), lost, good) == good
    assert best_after(("loss", "min"), good, {**lost, "step": 3}) == good
    for infinite in (math.inf, -math.inf):
        assert best_after(("loss", "min"), {"step": 1, "loss": infinite}) is None
        assert best_after(("loss", "max"), good, {"step": 3, "loss": infinite}) == good


def test_a_validation_before_the_first_step_is_never_the_best() -> None:
    good, worse = {"step": 0, "loss": 1.0}, {"step": 5, "loss": 2.0}
    assert best_after(("loss", "min"), good) is None
    assert best_after(("loss", "min"), good, worse) == worse


@reproducible
@given(st.lists(values, max_size=12), st.sampled_from(["min", "max"]))
def test_the_best_is_the_first_of_the_finite_extremes(found: list[float], direction: str) -> None:
    best = Best(f"{direction} loss", ("accuracy", "max"))
    for step, value in enumerate(found, start=1):
        best.update(step, {"loss": value})
    finite = [value for value in found if math.isfinite(value)]
    if not finite:
        assert (best.row, best.step) == (None, None)
        return
    extreme = min(finite) if direction == "min" else max(finite)
    assert best.step == next(step for step, value in enumerate(found, start=1) if value == extreme)
    assert best.row == {"step": best.step, "loss": extreme}


def test_what_is_no_number_is_never_better_and_any_number_is_better_than_it() -> None:
    for nothing in (None, "0.5", [0.5], math.nan):
        assert not is_better(("loss", "max"), nothing, 0.5)
    for nothing in (None, "0.5", [0.5]):
        assert is_better(("loss", "max"), 0.1, nothing)


def test_the_best_of_earlier_attempts_counts() -> None:
    best = Best(None, ("loss", "min"))
    best.row = {"step": 4, "loss": 1.0}  # as a checkpoint has it
    best.update(6, {"loss": 2.0})
    assert best.step == 4
    best.update(8, {"loss": 0.5, "samples": 9})
    assert best.row == {"step": 8, "loss": 0.5, "samples": 9}


def test_a_metric_that_validation_does_not_give_is_refused_with_those_that_it_gives() -> None:
    with pytest.raises(UsageError, match=r"validation gives no 'accuracy', but loss, r2\. Let summary\(\) return it"):
        Best("max accuracy", ("loss", "min")).update(1, {"loss": 1.0, "r2": 0.5, "samples": 9})


@pytest.mark.parametrize(("samples", "says"), [(9, ""), (10, r" These are the metrics of 9 of 10 samples, .*\.")])
def test_where_some_samples_have_no_such_metric_the_way_out_is_said(samples: int, says: str) -> None:
    with pytest.raises(UsageError, match=rf"validation gives no 'accuracy', but loss\. .*one of these\.{says}$"):
        Best("max accuracy", ("loss", "min")).check({"loss": 1.0, "samples": 9}, samples)


def test_the_best_checkpoint_is_the_configs_or_else_the_tasks() -> None:
    assert Best(None, Classification().best).rule == ("accuracy", "max")
    assert Best(None, Regression().best).rule == ("loss", "min")
    assert Best("max accuracy", Regression().best).rule == ("accuracy", "max")
    assert Best("min loss", Classification().best).rule == ("loss", "min")
    assert Best("max mean_iou", Regression().best).rule == ("mean_iou", "max")

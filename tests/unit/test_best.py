"""The best of several validations."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distloop.config.settings import EarlyStop
from distloop.errors import UsageError
from distloop.run.best import Best, EarlyEnd, is_better
from distloop.tasks import Classification, Regression

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


# ---- train.early_stop ------------------------------------------------------------------------------------------------


def waiting(patience: int, metric: str | None = None, min_delta: float = 0.0) -> Best:
    best = Best(None, ("accuracy", "max"))
    best.early_end = EarlyEnd(EarlyStop(patience, metric, min_delta), best.rule)
    return best


@pytest.mark.parametrize(
    ("settings", "values", "step", "reason"),
    [
        ((2,), [0.5, 0.6, 0.6, 0.4, 0.9], 4, "no better accuracy than 0.6 of step 2 in 2 validations"),
        ((1,), [0.5, 0.6, 0.59], 3, "no better accuracy than 0.6 of step 2 in 1 validation"),
        ((2,), [0.5, 0.4, 0.6, 0.5, 0.7], None, None),
        ((2, None, 0.1), [0.5, 0.55, 0.59, 0.9], 3, "no better accuracy than 0.5 of step 1 by more than 0.1 in 2 vali"),
        ((2, None, 0.1), [0.5, 0.55, 0.7, 0.75, 0.9], None, None),
        ((2, "min accuracy"), [0.5, 0.6, 0.6], 3, "no better accuracy than 0.5 of step 1 in 2 validations"),
        ((2, "min accuracy", 0.1), [0.5, 0.45, 0.39, 0.4, 0.3], 5, "no better accuracy than 0.39 of step 3 by more"),
        ((2,), [0.5, math.nan, math.nan, 0.9], 3, "no better accuracy than 0.5 of step 1 in 2 validations"),
        ((2,), [math.nan, math.inf, 0.9], 2, "accuracy was no finite number in 2 validations"),
        ((2,), [math.nan, 0.1, math.nan, 0.2], None, None),
    ],
)
def test_a_run_ends_after_so_many_validations_without_improvement(
    settings: Any, values: list[float], step: int | None, reason: str | None
) -> None:
    """The same, continued after each validation: each time another object, with what state.json holds."""
    whole, parts = waiting(*settings), waiting(*settings)
    for number, value in enumerate(values, 1):
        whole.update(number, {"accuracy": value})
        parts.update(number, {"accuracy": value})
        stored = json.loads(json.dumps(parts.early_end.state()))
        parts = waiting(*settings)
        parts.early_end.load(stored, same_config=True)
        assert parts.early_end.reason == whole.early_end.reason
        if whole.early_end.reason is not None:
            break
    assert (number if whole.early_end.reason else None) == step
    assert reason is None or (whole.early_end.reason or "").startswith(reason)


def test_a_validation_that_is_done_again_counts_once() -> None:
    """As after an error between the metrics and the log of their row."""
    best = waiting(2)
    for step in (1, 2, 2):
        best.update(step, {"accuracy": 0.5})
    assert best.early_end.reason is None
    best.update(3, {"accuracy": 0.5})
    assert best.early_end.reason is not None


def test_with_more_patience_a_run_goes_on_and_another_metric_begins_anew() -> None:
    ended = waiting(2)
    for step in (1, 2, 3):
        ended.update(step, {"accuracy": 0.5, "loss": 1.0})
    stored = ended.early_end.state()
    assert stored["finished"] == "no better accuracy than 0.5 of step 1 in 2 validations"
    patient, other = waiting(3), waiting(2, "min loss")
    for best in (patient, other):
        best.early_end.load(stored, same_config=False)
        assert best.early_end.reason is None
        best.update(4, {"accuracy": 0.5, "loss": 1.0})
    assert patient.early_end.reason == "no better accuracy than 0.5 of step 1 in 3 validations"
    assert (other.early_end.reason, other.early_end.waited) == (None, 0)
    fresh = waiting(2)
    fresh.early_end.load({}, same_config=True)  # of a run that was begun without
    assert (fresh.early_end.reason, fresh.early_end.waited) == (None, 0)


def test_a_metric_of_early_stop_that_validation_does_not_give_is_refused() -> None:
    with pytest.raises(UsageError, match=r"train\.early_stop\.metric: validation gives no 'auc', but accuracy, loss"):
        waiting(2, "max auc").check({"accuracy": 0.5, "loss": 1.0, "samples": 9})
    waiting(2, "max accuracy/night").check({"accuracy": 0.5, "accuracy/night": 0.4})

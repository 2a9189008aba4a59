"""The best of several validations."""

from __future__ import annotations

import math

import pytest

from distloop.errors import UsageError
from distloop.training.best import best_rule, better
from distloop.training.tasks import Classification, Regression


def test_the_better_row_follows_the_tasks_direction_and_the_earlier_one_wins_a_tie() -> None:
    first, second = {"step": 1, "accuracy": 0.5, "loss": 2.0}, {"step": 2, "accuracy": 0.6, "loss": 1.0}
    assert better(("accuracy", "max"), None, first) == first
    assert better(("accuracy", "max"), first, second) == second
    assert better(("loss", "min"), second, first) == second
    assert better(("loss", "min"), first, {**first, "step": 3}) == first


def test_a_validation_that_is_not_a_number_is_never_the_best() -> None:
    lost, good = {"step": 1, "loss": math.nan}, {"step": 2, "loss": 1.0}
    assert better(("loss", "min"), None, lost) is None
    assert better(("loss", "min"), better(("loss", "min"), None, lost), good) == good
    assert better(("loss", "min"), good, lost) == good


def test_a_metric_that_validation_does_not_give_is_refused_with_those_that_it_gives() -> None:
    row = {"step": 1, "loss": 1.0, "r2": 0.5, "samples": 9}
    with pytest.raises(UsageError, match="validation gives no 'accuracy', but loss, r2"):
        better(("accuracy", "max"), None, row)


def test_the_best_checkpoint_is_the_configs_or_else_the_tasks() -> None:
    assert best_rule(None, Classification()) == ("accuracy", "max")
    assert best_rule(None, Regression()) == ("loss", "min")
    assert best_rule("min loss", Classification()) == ("loss", "min")
    assert best_rule("max mean_iou", Regression()) == ("mean_iou", "max")

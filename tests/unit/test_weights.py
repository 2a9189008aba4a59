"""Weights of losses: numbers are compared at once, tensors on a GPU when the loop reads, and before it saves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distloop.errors import UsageError
from distloop.training.losses import LossSums
from distloop.training.weights import MOST_UNREAD

CPU = torch.device("cpu")


class OnGpu(Tensor):
    """A tensor of the CPU that says that it is on a GPU."""

    device = property(lambda _: torch.device("cuda", 0))


def on_gpu(number: float) -> Tensor:
    return torch.tensor(number).as_subclass(OnGpu)


def sums(*weights: Any, samples: int | None = 8) -> LossSums:
    losses = LossSums(CPU)
    for weight in weights:
        losses.add(torch.tensor(1.0), weight, samples=samples)
    losses.end_step()
    return losses


@pytest.mark.parametrize(
    "weight", [8, 8.0, torch.tensor(8), torch.tensor(8.0), np.int64(8), np.float32(8), np.array(8)]
)
def test_any_form_of_the_right_number_counts(weight: Any) -> None:
    assert sums(weight, weight).read()["loss"] == 2 / 16


@pytest.mark.parametrize(
    "weight", [7, True, 8.5, torch.tensor(7), np.float64(9), float("nan"), None, "8", torch.ones(8), -8]
)
def test_another_number_is_refused(weight: Any) -> None:
    with pytest.raises(UsageError, match=r"task\.loss\(\) returned"):
        sums(weight).read()  # of a tensor, when the loop reads; else at once


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), torch.tensor(-1), None, torch.ones(1), 1j])
def test_what_counts_nothing_is_refused_whatever_it_counts(weight: Any) -> None:
    with pytest.raises(UsageError, match=r"task\.loss\(\) returned"):
        sums(weight, samples=None).read()


@pytest.mark.parametrize(("weight", "samples"), [(7, 8), (-1, None), (float("nan"), None), (float("nan"), 8)])
def test_a_wrong_number_on_a_gpu_is_refused_when_the_loop_reads(weight: float, samples: int | None) -> None:
    right = on_gpu(8.0)
    losses = sums(right, on_gpu(weight), right, samples=samples)  # the host does not wait here
    for _ in range(3):
        losses.begin_step()
        losses.add(torch.tensor(1.0), right, samples=samples)
        losses.end_step()
    with pytest.raises(UsageError, match=rf"the weight {weight}"):
        losses.read()


def test_a_right_number_on_a_gpu_passes() -> None:
    losses = sums(on_gpu(8), on_gpu(8))
    losses.read()
    assert losses.weights.unread == []


def test_where_nobody_reads_weights_on_a_gpu_are_not_kept_for_ever() -> None:
    losses = sums(*[on_gpu(8)] * (MOST_UNREAD - 1))
    with pytest.raises(UsageError, match="the weight 7 for 8 samples"):
        losses.add(torch.tensor(1.0), on_gpu(7), samples=8)


def test_an_empty_micro_batch_counts_nothing_and_its_weight_is_that_of_one_sample() -> None:
    losses = sums(8)
    losses.begin_step()
    losses.add(torch.tensor(1.0), 1, is_empty=True, samples=1)
    assert losses.step_weight == 0
    with pytest.raises(UsageError, match="the weight 2 for 1 sample\\."):
        losses.add(torch.tensor(1.0), 2, is_empty=True, samples=1)


# ---- more sums by name -----------------------------------------------------------------------------------------


def test_sums_by_name_are_divided_by_the_weight_of_the_step_whatever_their_form() -> None:
    losses, total = LossSums(CPU), torch.tensor(0.1)
    for is_empty in (False, False, True):
        total += 0.1  # of a task that returns what it goes on adding to: each value counts as it was
        numbers = {f"number {place}": place for place in range(12)}  # more than one block of an exchange
        more = {"tensor": torch.ones(1, 1, requires_grad=True), "running": total, "count": np.int64(3), **numbers}
        losses.add(torch.tensor(1.0), 4, is_empty, sums=more)
    read = losses.read()
    assert {name: read[name] for name in ("loss", "tensor", "count", "number 11")} == {
        "loss": 2 / 8,
        "tensor": 2 / 8,
        "count": 6 / 8,
        "number 11": 22 / 8,
    }
    assert read["running"] == pytest.approx(0.5 / 8)
    assert losses.step_sums["running"].dtype == torch.float64
    losses.begin_step()
    losses.add(torch.tensor(1.0), 4)
    assert set(losses.read()) == {"loss", "running_loss", "memory_gib"}


@pytest.mark.parametrize(
    "wrong", [{"lr": 1}, {"samples": 1}, {"step": 1}, {1: 1}, {"text": "1"}, {"pair": torch.ones(2)}, {"j": 1j}, [1]]
)
def test_other_sums_and_names_of_a_row_are_refused_at_once(wrong: Any) -> None:
    with pytest.raises(UsageError, match=r"task\.loss\(\)"):
        LossSums(CPU).add(torch.tensor(1.0), 4, sums=wrong)


@pytest.mark.parametrize("wrong", ["1", torch.ones(2), torch.ones(0), None])
def test_a_sum_that_becomes_something_else_in_a_later_step_is_named(wrong: Any) -> None:
    losses = LossSums(CPU)
    losses.add(torch.tensor(1.0), 4, sums={"hits": 1})
    losses.begin_step()
    with pytest.raises(UsageError, match=r"task\.loss\(\): hits is a "):
        losses.add(torch.tensor(1.0), 4, sums={"hits": wrong})

"""Models of torchvision that give several tensors in training: their usual weights; other tuples are refused."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchvision.models.googlenet import GoogLeNetOutputs
from torchvision.models.inception import InceptionOutputs

from distloop.errors import UsageError
from distloop.tasks import Classification

TARGETS = torch.tensor([0, 2, 1])
BATCH = (torch.zeros(3, 1), TARGETS)
Unknown = namedtuple("Unknown", ["logits", "aux_logits"])


def logits(seed: int) -> Tensor:
    return torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(outputs: Tensor, **more: Any) -> Tensor:
    return cross_entropy(outputs, TARGETS, reduction="sum", **more)


def test_googlenet_trains_with_three_tenths_of_each_auxiliary_loss() -> None:
    one, two, three = logits(0), logits(1), logits(2)
    loss, weight = Classification().loss(GoogLeNetOutputs(one, two, three), BATCH)
    assert float(loss) == float(loss_of(one) + 0.3 * (loss_of(two) + loss_of(three)))
    assert weight == 3


def test_inception_trains_with_four_tenths_of_its_auxiliary_loss_and_both_are_smoothed() -> None:
    one, two = logits(0), logits(1)
    loss, weight = Classification(label_smoothing=0.1).loss(InceptionOutputs(one, two), BATCH)
    expected = loss_of(one, label_smoothing=0.1) + 0.4 * loss_of(two, label_smoothing=0.1)
    assert float(loss) == float(expected)
    assert weight == 3


def test_what_a_model_leaves_out_of_its_outputs_does_not_count() -> None:
    assert float(Classification().loss(InceptionOutputs(logits(0), None), BATCH)[0]) == float(loss_of(logits(0)))


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ((logits(0), logits(1)), "a tuple of 2"),
        (Unknown(logits(0), logits(1)), "an Unknown of 2"),
        ([logits(0)], "a list of 1"),
        ({"out": logits(0), "aux": logits(1)}, "a dict of out, aux"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_outputs_are_refused_with_the_way_out_whatever_they_look_like(outputs: Any, said: str) -> None:
    for method in (lambda task: task.loss(outputs, BATCH), lambda task: task.probe(outputs)):
        with pytest.raises(UsageError) as refused:
            method(Classification())
        message = str(refused.value)
        assert f"the model gave {said}" in message
        assert "loss() of your own" in message

"""The lines at the start of an attempt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from distloop.config.settings import Config
from distloop.data.order import Plan
from distloop.run.files import Start
from distloop.tracking.summary import describe


def line_of(model: nn.Module) -> str:
    """The line on a model."""
    config = Config(name="run")
    start = Start(Path("runs/run"), 1, None, None, 0, False, [], {})
    plan = Plan(samples=1437, global_batch_size=64, total_steps=10)
    return describe(config, start, plan, model, torch.device("cpu"), "net")[1]


def frozen(*names: str) -> nn.Module:
    """Two layers of 1,010 and 12 parameters, those of these layers frozen."""
    model = nn.Sequential(nn.Linear(100, 10), nn.Linear(5, 2))
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    return model


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "counts"),
    [
        (frozen(), "1,022 parameters"),
        (frozen("0"), "1,022 parameters, 12 of them trained,"),
        (frozen("1"), "1,022 parameters, 1,010 of them trained,"),
        (tied(), "120 parameters, 110 of them trained,"),
    ],
)
def test_parameters_are_counted_and_those_that_are_trained_where_not_all_are(model: nn.Module, counts: str) -> None:
    assert line_of(model) == f"net with {counts} on digits, 1,437 training samples"

"""The warm-up of DDP leaves nothing behind but the order of its sums; gradients are divided by the exact weight."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distloop.config.settings import Config
from distloop.data.datasets import DataSource
from distloop.data.order import Plan
from distloop.data.whole_batches import InMemory
from distloop.training.gradients import divide_by_weight, trial_batches


class Network(nn.Module):
    calls: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("mean", torch.tensor(0.0))

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + inputs.detach().mean()  # another tensor each time
        return self.layers(inputs)


def test_the_trial_passes_change_neither_parameters_nor_buffers_and_leave_no_gradient() -> None:
    torch.manual_seed(0)
    models = Network().eval(), Network()
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    half = InMemory(torch.randn(20, 3), torch.randn(20, 1))
    batches = trial_batches(Config(), DataSource(half, half), Plan(20, 16, 2), torch.device("cpu"), *models)
    sizes = []
    for inputs, targets in batches:
        sizes.append(len(inputs))
        for model in models:
            assert model.training
            (model(inputs) - targets).square().sum().backward()
            assert all(parameter.grad is not None for parameter in model.parameters())
    assert sizes == [8, 8], "DDP sorts its buckets after the first backward pass: a second one has to see them"
    for model, state in zip(models, before, strict=True):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name]), name
        assert all(parameter.grad is None for parameter in model.parameters())


def test_what_a_trial_pass_draws_does_not_depend_on_what_was_drawn_before() -> None:
    half = InMemory(torch.randn(20, 3), torch.randn(20, 1))

    def drawn() -> list[tuple[float, ...]]:
        batches = trial_batches(Config(), DataSource(half, half), Plan(20, 16, 2), torch.device("cpu"), Network())
        return [(float(torch.rand(())), float(np.random.random()), random.random()) for _ in batches]

    first = drawn()
    assert first[0] != first[1]
    assert drawn() == first


def test_one_process_needs_no_trial_pass() -> None:
    half = InMemory(torch.randn(20, 3), torch.randn(20, 1))
    assert list(trial_batches(Config(), DataSource(half, half), Plan(20, 16, 1), torch.device("cpu"), Network())) == []


@pytest.mark.parametrize("weight", [2.1, torch.tensor(2.1, dtype=torch.float64), 2**24 + 1])
def test_a_gradient_in_float64_is_divided_by_the_weight_in_float64(weight: float | Tensor) -> None:
    model = nn.Linear(3, 1, dtype=torch.float64)
    model(torch.ones(3, dtype=torch.float64)).backward()
    divide_by_weight(model, weight, samples=8)  # type: ignore[arg-type]
    assert model.weight.grad is not None
    assert torch.allclose(model.weight.grad, torch.tensor(8 / float(weight), dtype=torch.float64), rtol=1e-14, atol=0)

"""The warm-up of DDP leaves nothing behind but the order of its sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distloop.training.gradients import trial_passes
from distloop.training.tasks import Regression


class Network(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return self.layers(inputs)


def test_the_warm_up_changes_neither_parameters_nor_buffers_and_leaves_no_gradient() -> None:
    torch.manual_seed(0)
    model = Network().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients: list[float] = []

    def backward(loss: Tensor) -> None:
        loss.backward()
        gradients.append(float(sum(p.grad.abs().sum() for p in model.parameters() if p.grad is not None)))

    batch: Any = (torch.randn(8, 3), torch.randn(8, 1))
    trial_passes(model, model, Regression(), batch, backward)
    assert len(gradients) == 2, "DDP sorts its buckets after the first backward pass: a second one has to see them"
    assert min(gradients) > 0
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())

"""Activation checkpointing: the same bits with fewer activations kept."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from distloop.config.load import load_config
from distloop.errors import UsageError
from distloop.training.gpt import gpt
from distloop.training.models import cnn, resnet18_small
from distloop.training.recomputing import Recomputed, in_words, recompute, segments_of


class Draws(nn.Module):
    """Draws from all global generators, and counts its passes in buffers of two kinds."""

    count: Tensor
    smooth: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("smooth", torch.zeros(()), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        self.count += 1
        self.smooth = 0.5 * self.smooth + values.detach().mean()  # another tensor each time
        return values * (1 + random.random() + np.random.random() + torch.rand(()) + 0.1 * self.count + self.smooth)


def drawing() -> nn.Module:
    layers = [spectral_norm(nn.Linear(8, 8)), nn.BatchNorm1d(8), nn.ReLU(inplace=True), Draws(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=None)), nn.Linear(8, 4))


CASES: dict[str, tuple[Any, Any]] = {
    "cnn": (lambda: cnn((1, 8, 8), 10, width=4, norm="batch", dropout=0.5), lambda: torch.randn(6, 1, 8, 8)),
    "resnet": (lambda: resnet18_small(10), lambda: torch.randn(2, 3, 8, 8)),
    "gpt": (lambda: gpt(16, (8,), width=8, layers=4, heads=2, dropout=0.2), lambda: torch.randint(16, (2, 8))),
    "drawing": (drawing, lambda: torch.randn(5, 8)),
}


def two_steps(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """Losses, gradients and buffers of two steps of two micro-batches each, and where the generators then are."""
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(2):
        for micro in inputs.chunk(2):
            loss = model(micro).pow(2).sum()
            loss.backward()
            found.append(loss.detach())
        found += [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        found += [buffer.clone() for buffer in model.buffers()]
        optimizer.step()
        optimizer.zero_grad()
    return [*found, torch.rand(3), torch.tensor([random.random(), np.random.random()])]


@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_buffers_and_draws_are_the_same_to_the_bit(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = CASES[name][0](), CASES[name][1]()
    inputs = torch.cat([inputs, inputs])
    other = copy.deepcopy(model)
    recompute(other)
    assert list(other.state_dict()) == list(model.state_dict())
    expected, found = two_steps(model, inputs), two_steps(other, inputs)
    assert all(torch.equal(one, two) for one, two in zip(expected, found, strict=True))


def test_buffers_stay_the_same_tensors() -> None:
    model = cnn((1, 8, 8), 10, width=4, norm="batch")
    recompute(model)
    before = list(model.buffers())
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    assert all(one is other for one, other in zip(before, model.buffers(), strict=True)), "DDP and averages hold them"
    assert [int(buffer) for name, buffer in model.named_buffers() if "num_batches" in name] == [1, 1, 1, 1]


@pytest.mark.long
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "densenet121", "shufflenet_v2_x0_5", "swin_t", "convnext_tiny"])
def test_torchvisions_models_are_the_same_to_the_bit(name: str) -> None:
    from torchvision.models import get_model

    torch.manual_seed(0)
    model = get_model(name, weights=None, num_classes=10)
    other, images = copy.deepcopy(model), torch.randn(4, 3, 64, 64)
    recompute(other)
    assert all(torch.equal(*pair) for pair in zip(two_steps(model, images), two_steps(other, images), strict=True))


def test_a_gradient_of_the_gradient_is_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 1))
    other, results = copy.deepcopy(model), []
    recompute(other)
    for one in (model, other):
        torch.manual_seed(1)
        inputs = torch.ones(6, 4, requires_grad=True) * torch.arange(6.0)[:, None]
        outputs = one(inputs).sum()
        (slope,) = torch.autograd.grad(outputs, inputs, create_graph=True)
        (outputs + slope.pow(2).sum()).backward()
        results.append([*(parameter.grad for parameter in one.parameters()), *one.buffers()])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def bytes_kept(model: nn.Module, inputs: Tensor) -> int:
    """Of what the graph holds for the backward pass, without what checkpoint() holds, which are inputs of segments."""
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        model(inputs).sum()
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    return sum(tensor.nbytes for place, tensor in kept.items() if place not in parameters)


@pytest.mark.parametrize("name", ["cnn", "resnet", "gpt"])
def test_few_activations_are_kept(name: str) -> None:
    model, inputs = CASES[name][0](), CASES[name][1]()
    before = bytes_kept(model, inputs)
    recompute(model)
    assert bytes_kept(model, inputs) < 0.5 * before


def test_a_sequence_is_cut_into_segments_of_the_root_of_its_length() -> None:
    def lengths(model: nn.Sequential) -> list[int]:
        recompute(model)
        return [len(segment) for segment in segments_of(model)]

    assert lengths(nn.Sequential(*(nn.Linear(1, 1) for _ in range(16)))) == [4, 4, 4, 4]
    assert lengths(nn.Sequential(*(nn.Linear(1, 1) for _ in range(6)))) == [2, 2, 2]
    # What changes its input in place begins no segment.
    layers = [nn.Linear(1, 1), nn.ReLU(), nn.SiLU(inplace=True), nn.Linear(1, 1)]
    assert lengths(nn.Sequential(*layers)) == [3, 1]
    assert lengths(nn.Sequential(nn.SiLU(inplace=True), *layers)) == [1, 3, 1]
    # Sequences within one are cut themselves.
    inner = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    outer = nn.Sequential(nn.Linear(1, 1), inner, nn.Sequential(nn.ReLU()), nn.Linear(1, 1), nn.Linear(1, 1))
    assert lengths(outer) == [1, 1, 1, 1, 1]
    assert isinstance(inner, Recomputed)


def test_nothing_is_recomputed_within_what_is() -> None:
    model = resnet18_small(10)
    recompute(model)
    found = [name for name, module in model.named_modules() if isinstance(module, Recomputed)]
    assert found == ["layer1", "layer2", "layer3", "layer4"]
    assert in_words(model) == "activation checkpointing on (8 segments)"
    assert in_words(nn.Linear(1, 1)) == "activation checkpointing off"


def test_an_inplace_activation_at_a_border_changes_nothing() -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(4, 4), nn.SiLU(inplace=True))]
    model = nn.Sequential(nn.SiLU(inplace=True), *layers)
    other, inputs = copy.deepcopy(model), torch.randn(3, 4)
    recompute(other)
    results = []
    for one in (model, other):
        one(inputs.clone()).pow(2).sum().backward()
        results.append([parameter.grad for parameter in one.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


class Within(nn.Module):
    """Changes its input in place, without an attribute that says so."""

    def forward(self, values: Tensor) -> Tensor:
        return values.add_(1).sigmoid()


class Afterwards(nn.Module):
    """Changes in place what it has given to a sequence before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.sequence = nn.Linear(2, 2), nn.Sequential(nn.ReLU())

    def forward(self, values: Tensor) -> Tensor:
        values = self.first(values)
        outputs = self.sequence(values)  # keeps what it returns, so that without checkpointing all is well
        values += outputs
        return values


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(2, 2), Within()), Afterwards()])
def test_an_input_that_is_changed_in_place_is_refused(model: nn.Module) -> None:
    model(torch.randn(3, 2)).sum().backward()
    recompute(model)
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        model(torch.randn(3, 2)).sum().backward()


def test_a_model_without_a_sequence_is_refused() -> None:
    class Own(nn.Sequential):  # whose forward() may be another one
        pass

    for model in (nn.Linear(1, 1), Own(nn.Linear(1, 1)), nn.Sequential()):
        with pytest.raises(UsageError, match=r"has no nn\.Sequential"):
            recompute(model)


class KeepsItself(nn.Module):
    """Has a number, tensors and generators that are no buffers, and change in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.passes, self.mean, self.share = 0, torch.zeros(()), torch.ones(())
        self.generators = torch.Generator().manual_seed(0)
        self.of_numpy, self.of_python = np.random.default_rng(0), random.Random(0)

    def forward(self, values: Tensor) -> Tensor:
        self.passes += 1
        self.mean = 0.9 * self.mean + 0.1 * values.detach().mean()
        self.share.mul_(0.9)
        drawn = torch.rand(values.shape, generator=self.generators) + self.of_numpy.random() + self.of_python.random()
        return (values * drawn).tanh() * (self.passes + self.mean + self.share)


def test_a_state_in_attributes_is_that_of_the_first_pass() -> None:
    results = []
    for is_recomputed in (False, True):
        torch.manual_seed(0)
        first, second = KeepsItself(), KeepsItself()
        model = nn.Sequential(
            first, nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Tanh(), second, nn.Tanh(), nn.Linear(8, 4)
        )
        if is_recomputed:
            recompute(model)
        kept = two_steps(model, torch.randn(4, 8))
        results.append([*kept, *(torch.tensor([one.passes, one.mean, one.share]) for one in (first, second))])
        results[-1].append(torch.tensor([one.of_numpy.random() for one in (first, second)]))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


class Beside(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, values: Tensor) -> Tensor:
        return values + self.inner(values)


def test_nothing_is_recomputed_within_a_sequence_that_two_modules_share() -> None:
    shared = nn.Sequential(Beside(nn.Sequential(nn.Linear(2, 2), nn.Tanh())), nn.Linear(2, 2))
    model = Beside(nn.ModuleList([Beside(shared), Beside(shared)]))
    recompute(model)
    assert [module for module in model.modules() if isinstance(module, Recomputed)] == [shared]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_script_module_is_refused() -> None:
    with pytest.raises(UsageError, match=r"the model has a ScriptModule"):
        recompute(nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2))))


def test_compiled_models_are_refused() -> None:
    with pytest.raises(UsageError, match=r"model\.checkpointing and compile: "):
        load_config(["--compile", "--model.checkpointing"])

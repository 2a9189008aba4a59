"""Settings of optimizers in groups of their own; and what optimizers keep elsewhere than in moments like their
parameters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distloop.config.optim_settings import Group, OptimizerOfGroup
from distloop.config.settings import Optim
from distloop.data.order import Plan
from distloop.errors import UsageError
from distloop.tasks import Task
from distloop.training.groups import freeze
from distloop.training.nonfinite import FiniteCheck
from distloop.training.optimizers import build_optimizer, in_words
from tests.unit.test_optimizers import CPU, TAKES_ANY, load, model_of, stored, train


def build(model: nn.Module, *groups: Group, **settings: Any) -> torch.optim.Optimizer:
    return build_optimizer(model, Optim(**settings, groups=groups), CPU, "no")


def test_an_optimizer_of_a_group_takes_all_its_arguments() -> None:
    group = Group("^0", optimizer=OptimizerOfGroup("sgd", {"momentum": 0.5, "nesterov": True}))
    optimizer = build(model_of(), group)
    assert [each.get("momentum") for each in optimizer.param_groups] == [0.5, 0.5, None, None]
    group = Group("^0", optimizer=OptimizerOfGroup("adamw", {"betas": [0.8, 0.9]}))
    optimizer = build(model_of(), group, name="sgd")
    assert [each.get("betas") for each in optimizer.param_groups] == [(0.8, 0.9)] * 2 + [None] * 2


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"lr": 1}, r"optim.groups\[0\].optimizer.args.lr: give it as optim.groups\[0\].lr_scale"),
        ({"weight_decay": 1}, r"args.weight_decay: give it as optim.groups\[0\].weight_decay"),
        ({"fused": False}, "args.fused: leave it out"),
        ({"params": []}, "args.params: leave it out"),
    ],
)
def test_an_argument_that_belongs_elsewhere_is_named_with_its_place(args: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        build(model_of(), Group("^0", optimizer=OptimizerOfGroup("nadam", args)))


def test_an_empty_pattern_is_that_of_all_the_rest() -> None:
    optimizer = build(model_of(), Group("^2", lr_scale=2), Group("", optimizer=OptimizerOfGroup("nadam")))
    assert in_words(optimizer) == "NAdam and AdamW, fused"


def sparse_model() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("group", "settings"),
    [
        (Group("^0", weight_decay=0.0), {"name": "sgd", "momentum": 0.0}),
        (Group("^0", weight_decay=0.0, optimizer=OptimizerOfGroup("sgd", {"momentum": 0})), {}),
        (Group("^0", weight_decay=0.0, optimizer=OptimizerOfGroup("adagrad")), {}),
    ],
)
def test_a_group_of_sparse_gradients_may_have_the_settings_for_them(group: Group, settings: dict[str, Any]) -> None:
    model = sparse_model()
    optimizer = build(model, group, **settings)
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("group", "settings", "said"),
    [
        (Group("^0", weight_decay=0.1), {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0}, "with weight decay 0.1"),
        (Group("^0", optimizer=OptimizerOfGroup("sgd")), {}, "with momentum 0.9 and weight decay 0.05 cannot"),
        (Group("^0", optimizer=OptimizerOfGroup("adagrad")), {}, "'adagrad' with weight decay 0.05 cannot take it"),
        (Group("^0"), {}, "'adamw' cannot take it.*optimizer: {name: sparseadam}"),
    ],
)
def test_what_takes_no_sparse_gradient_is_refused_by_its_groups_settings(
    group: Group, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        build(sparse_model(), group, **settings)


# ---- what is not a moment of the parameter's form ------------------------------------------------------------------


class Base(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "factor": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(self.update_of(group, parameter), alpha=group["lr"])

    def update_of(self, group: dict[str, Any], parameter: nn.Parameter) -> torch.Tensor:
        raise NotImplementedError


class KeepsInGroups(Base):
    def update_of(self, group: dict[str, Any], parameter: nn.Parameter) -> torch.Tensor:
        group["factor"] *= 0.9
        return parameter.grad * group["factor"]


class KeepsShortMoments(Base):
    def update_of(self, group: dict[str, Any], parameter: nn.Parameter) -> torch.Tensor:
        short = torch.zeros_like(parameter, dtype=torch.bfloat16)
        return self.state[parameter].setdefault("moment", short).mul_(0.9).add_(parameter.grad)


class KeepsForAll(Base):
    def update_of(self, group: dict[str, Any], parameter: nn.Parameter) -> torch.Tensor:
        state: Any = self.state
        state["count"] = state.get("count", 0) + 1
        return parameter.grad / state["count"]


@pytest.mark.parametrize("name", [*TAKES_ANY, *(f"{__name__}:Keeps{each}" for each in ("InGroups", "ForAll"))])
def test_optimizers_go_on_with_the_same_bits_in_float64(name: str, tmp_path: Path) -> None:
    goes_on_alike(name, torch.float64, tmp_path)


@pytest.mark.parametrize("each", ["InGroups", "ShortMoments", "ForAll"])
def test_state_of_another_form_goes_on_with_the_same_bits(each: str, tmp_path: Path) -> None:
    goes_on_alike(f"{__name__}:Keeps{each}", torch.float32, tmp_path)


def goes_on_alike(name: str, dtype: torch.dtype, path: Path) -> None:
    model = model_of().to(dtype)
    optimizer = build(model, name=name, lr=0.01, weight_decay=0.0)
    train(model, optimizer, 0, 3)
    file = stored(model, optimizer, path)
    continued = copy.deepcopy(model)
    loaded = build(continued, name=name, lr=0.01, weight_decay=0.0)
    load(file, continued, loaded)
    train(model, optimizer, 3, 8)
    train(continued, loaded, 3, 8)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), continued.parameters(), strict=True))


def test_settings_of_the_config_are_not_taken_for_state(tmp_path: Path) -> None:
    model = model_of()
    optimizer = build(model, name="nadam", args={"momentum_decay": 0.5})
    train(model, optimizer, 0, 1)
    file = stored(model, optimizer, tmp_path)
    assert torch.load(file)["kept_in_groups"] == [[], []]
    loaded = build(model, name="nadam", args={"momentum_decay": 0.25})
    load(file, model, loaded)
    assert [group["momentum_decay"] for group in loaded.param_groups] == [0.25, 0.25]


# ---- with other settings -------------------------------------------------------------------------------------------


def test_a_dampened_first_step_is_the_same_where_bad_steps_are_left_out() -> None:
    found = []
    for policy in ("stop", "skip"):
        model = model_of()
        optimizer = build(model, name="sgd", lr=0.01, args={"dampening": 0.5})
        finite = FiniteCheck(policy, model, optimizer, None, Plan(8, 4))
        model(torch.ones(2, 3)).sum().backward()
        finite.begin_step()
        finite.before_update(0, torch.tensor(1.0), [])
        optimizer.step()
        found.append(copy.deepcopy(list(model.parameters())))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_a_batch_norm_in_a_frozen_part_of_a_task_keeps_its_statistics() -> None:
    class Normalising(Task, nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(3), nn.Linear(3, 1)

    task = Normalising()
    freeze(nn.Linear(2, 2), (Group(r"^task\.norm"),), task)
    task.train()
    task.norm(torch.ones(4, 3))
    assert task.norm.running_mean is not None
    assert task.norm.running_mean.any()
    freeze(nn.Linear(2, 2), (Group(r"^task\.norm", freeze=True),), task)
    before = task.norm.running_mean.clone()
    task.train()
    task.norm(torch.ones(4, 3))
    assert torch.equal(task.norm.running_mean, before)
